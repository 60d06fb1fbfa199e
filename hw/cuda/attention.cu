// Rule 7: attention over the paged cache, in three kernels that share pages out among blocks.
//
// Rows of a grid's z are neighbours of one sequence (one for decode, several for a prefill, which then read a page once for all);
// y is a key/value head with the query heads that share it, x a page, counted from the first that the rows see. Scores come first,
// with the maximum of each page; then the maximum is known, and each page is mixed by itself; then pages are added left to right.
#include "contract.cuh"

constexpr u32 SCORE_THREADS = 2 * PAGE;
constexpr u32 MIX_THREADS = 256;
// Queries that a page is read for together.
constexpr u32 QUERIES = 4;
// A key has at most so many values: one chunk.
constexpr u32 KEY_MAX = CHUNK;
// Queries whose weights stand in shared memory together.
constexpr u32 WEIGHED = 16;

// Rounds keys or values (rows x heads x dim) to the pages of their positions. A block for each row.
template <class T>
__device__ __forceinline__ void write_cache(const float* __restrict__ values, const u32* __restrict__ positions,
                                            const u32* __restrict__ pages, byte* __restrict__ cache, u64 page_bytes, u64 at,
                                            u32 heads, u32 dim) {
    values += u64(blockIdx.x) * heads * dim;
    byte* const page = cache + pages[blockIdx.x] * page_bytes + at;
    const u32 slot = positions[blockIdx.x] % PAGE;
    for (u32 i = threadIdx.x; i < heads * dim; i += blockDim.x) {
        T::put(page + ((u64(i / dim) * PAGE + slot) * dim + i % dim) * T::BYTES, values[i]);
    }
}

// The rows of a grid, and where their keys and values are.
struct Rows {
    const u32* positions;
    // For each z the first of its rows, and behind the last z their end.
    const u32* first_row;
    // For each z where the pages of its sequence begin in the table.
    const u32* first_page;
    const u32* table;
    const byte* cache;
    u64 page_bytes;
    u32 heads;
    u32 kv_heads;
    // Number of last positions that are seen; 0 for all.
    u32 window;
    // Pages that rows of one z see together, at most: pages of scores.
    u32 span;

    __device__ __forceinline__ u32 first() const { return first_row[blockIdx.z]; }
    __device__ __forceinline__ u32 group() const { return heads / kv_heads; }
    __device__ __forceinline__ u32 queries() const { return (first_row[blockIdx.z + 1] - first()) * group(); }
    __device__ __forceinline__ u32 row(u32 query) const { return first() + query / group(); }
    // The number of a query among all rows and heads.
    __device__ __forceinline__ u64 number(u32 query) const {
        return u64(row(query)) * heads + blockIdx.y * group() + query % group();
    }
    __device__ __forceinline__ u32 seen_from(u32 row) const {
        const u32 end = positions[row] + 1;
        return window != 0 && window < end ? end - window : 0;
    }
    __device__ __forceinline__ u32 seen_until(u32 row) const { return positions[row] + 1; }
    __device__ __forceinline__ bool sees(u32 row, u32 position) const {
        return seen_from(row) <= position && position < seen_until(row);
    }
    __device__ __forceinline__ bool sees_page(u32 row, u32 page) const {
        return seen_from(row) < (page + 1) * PAGE && page * PAGE < seen_until(row);
    }
    // The first page that some row of a z sees.
    __device__ __forceinline__ u32 base(u32 z) const {
        u32 least = ALL;
        for (u32 row = first_row[z]; row < first_row[z + 1]; row++) least = smaller(least, seen_from(row) / PAGE);
        return least;
    }
    // The end of what some row of this z sees.
    __device__ __forceinline__ u32 until() const {
        u32 most = 0;
        for (u32 row = first(); row < first_row[blockIdx.z + 1]; row++) {
            most = seen_until(row) > most ? seen_until(row) : most;
        }
        return most;
    }
    __device__ __forceinline__ const byte* page(u32 page) const {
        return cache + table[first_page[blockIdx.z] + page] * page_bytes;
    }
};

// Eight values at a place of a row, zeros beyond its end; rows begin at multiples of sixteen bytes if `aligned`.
template <class T>
__device__ __forceinline__ void eight_of_row(const byte* row, u32 at, u32 dim, bool aligned, float* out) {
    if (aligned && at + 8 <= dim) {
        T::eight(row + at * T::BYTES, out);
    } else {
#pragma unroll
        for (u32 o = 0; o < 8; o++) out[o] = at + o < dim ? T::value(row + (at + o) * T::BYTES) : 0.0f;
    }
}

// The largest of a warp's values, in all lanes.
__device__ __forceinline__ float largest_of_warp(float value) {
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(ALL, value, lanes);
        value = other > value ? other : value;
    }
    return value;
}

// Scores of a page for each query of a block, and the largest. Two threads have a key: eight lanes of rule 2 each.
template <class T>
__device__ __forceinline__ void score(const Rows& of, const float* __restrict__ q, float* __restrict__ scores,
                                      float* __restrict__ maxima, u64 keys_at, u32 key_dim, float scale) {
    SHARED(float, room, QUERIES* KEY_MAX);
    SHARED(float, largest, QUERIES* SCORE_THREADS / WARP);
    const u32 page = of.base(blockIdx.z) + blockIdx.x, slot = threadIdx.x / 2, part = threadIdx.x % 2;
    const u32 position = page * PAGE + slot;
    // Padded with zeros to whole steps.
    const u32 padded = pieces(key_dim, LANES) * LANES;
    const bool aligned = key_dim * T::BYTES % 16 == 0, exists = position < of.until();
    // A grid may be wider than what its rows see.
    if (page * PAGE >= of.until()) {
        for (u32 n = threadIdx.x; n < of.queries(); n += SCORE_THREADS) maxima[of.number(n) * of.span + blockIdx.x] = -infinity();
        return;
    }
    const byte* key = nullptr;
    if (exists) key = of.page(page) + keys_at + (u64(blockIdx.y) * PAGE + slot) * key_dim * T::BYTES;
    for (u32 first = 0; first < of.queries(); first += QUERIES) {
        for (u32 i = threadIdx.x; i < QUERIES * padded; i += SCORE_THREADS) {
            const u32 query = first + i / padded, at = i % padded;
            room[i] = query < of.queries() && at < key_dim ? q[of.number(query) * key_dim + at] : 0.0f;
        }
        __syncthreads();
        float acc[QUERIES][8] = {};
        for (u32 at = part * 8; exists && at < padded; at += LANES) {
            float values[8];
            eight_of_row<T>(key, at, key_dim, aligned, values);
#pragma unroll
            for (u32 n = 0; n < QUERIES; n++) {
                const float4 a = load_float4(room + n * padded + at), b = load_float4(room + n * padded + at + 4);
                const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
                for (u32 o = 0; o < 8; o++) acc[n][o] = fused(x[o], values[o], acc[n][o]);
            }
        }
#pragma unroll
        for (u32 n = 0; n < QUERIES; n++) {
            float sum = acc[n][0];
#pragma unroll
            for (u32 o = 1; o < 8; o++) sum += acc[n][o];
            // The second thread goes on where the first one is.
            sum = __shfl_sync(ALL, sum, threadIdx.x % WARP & ~1u);
#pragma unroll
            for (u32 o = 0; o < 8; o++) sum += acc[n][o];
            const u32 query = first + n;
            float seen = -infinity();
            if (part == 1 && query < of.queries() && of.sees(of.row(query), position)) {
                const float found = sum * scale;
                scores[(of.number(query) * of.span + blockIdx.x) * PAGE + slot] = found;
                seen = found > seen ? found : seen;
            }
            seen = largest_of_warp(seen);
            if (threadIdx.x % WARP == 0) largest[n * (SCORE_THREADS / WARP) + threadIdx.x / WARP] = seen;
        }
        __syncthreads();
        if (threadIdx.x < QUERIES && first + threadIdx.x < of.queries()) {
            const float* const four = largest + threadIdx.x * (SCORE_THREADS / WARP);
            float most = four[0];
            for (u32 i = 1; i < SCORE_THREADS / WARP; i++) most = four[i] > most ? four[i] : most;
            maxima[of.number(first + threadIdx.x) * of.span + blockIdx.x] = most;
        }
    }
}

// The largest score of a query, of its pages and its sink. By whole warps.
__device__ __forceinline__ float largest_of_pages(const float* maxima, u32 span, const float* sink) {
    float most = sink == nullptr ? -infinity() : *sink;
    for (u32 i = threadIdx.x % WARP; i < span; i += WARP) most = maxima[i] > most ? maxima[i] : most;
    return largest_of_warp(most);
}

// Mixes the values of a page for each query of a block. A thread has eight dimensions, for every `workers`-th four queries.
// Values are those at `values_at`, `stride` of them a row.
template <class T>
__device__ __forceinline__ void mix(const Rows& of, const float* __restrict__ scores, const float* __restrict__ maxima,
                                    const float* __restrict__ sinks, float* __restrict__ numerators,
                                    float* __restrict__ denominators, u64 values_at, u32 stride, u32 value_dim) {
    SHARED(float, weights, WEIGHED* PAGE);
    // Two barriers in each turn do: what a turn writes first, the one before read before its second.
    SHARED(float, peaks, WEIGHED);
    const u32 page = of.base(blockIdx.z) + blockIdx.x, groups = pieces(value_dim, 8);
    const u32 at = threadIdx.x % groups * 8, worker = threadIdx.x / groups, workers = blockDim.x / groups;
    const bool aligned = stride * T::BYTES % 16 == 0;
    // Where nobody sees anything.
    if (page * PAGE >= of.until()) return;
    const byte* const values = of.page(page) + values_at + u64(blockIdx.y) * PAGE * stride * T::BYTES;
    const u32 slots = smaller(PAGE, of.until() - page * PAGE);
    for (u32 first = 0; first < of.queries(); first += WEIGHED) {
        const u32 count = smaller(WEIGHED, of.queries() - first);
        for (u32 n = threadIdx.x / WARP; n < count; n += blockDim.x / WARP) {
            const u64 number = of.number(first + n);
            const float* const sink = sinks == nullptr ? nullptr : sinks + number % of.heads;
            const float peak = largest_of_pages(maxima + number * of.span, of.span, sink);
            if (threadIdx.x % WARP == 0) peaks[n] = peak;
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < count * PAGE; i += blockDim.x) {
            const u32 n = i / PAGE, slot = i % PAGE;
            const u64 number = of.number(first + n);
            if (of.sees(of.row(first + n), page * PAGE + slot)) {
                weights[i] = exponential(scores[(number * of.span + blockIdx.x) * PAGE + slot] - peaks[n]);
            }
        }
        __syncthreads();
        if (threadIdx.x < count && of.sees_page(of.row(first + threadIdx.x), page)) {
            float sum = 0.0f;
            for (u32 slot = 0; slot < slots; slot++) {
                if (of.sees(of.row(first + threadIdx.x), page * PAGE + slot)) sum += weights[threadIdx.x * PAGE + slot];
            }
            denominators[of.number(first + threadIdx.x) * of.span + blockIdx.x] = sum;
        }
        for (u32 n = worker * QUERIES; n < count && worker < workers; n += workers * QUERIES) {
            float acc[QUERIES][8] = {};
            u32 from[QUERIES], until[QUERIES];
#pragma unroll
            for (u32 i = 0; i < QUERIES; i++) {
                const u32 row = of.row(first + smaller(n + i, count - 1));
                from[i] = of.seen_from(row), until[i] = of.seen_until(row);
            }
            for (u32 slot = 0; slot < slots; slot++) {
                float eight[8];
                eight_of_row<T>(values + u64(slot) * stride * T::BYTES, at, value_dim, aligned, eight);
                const u32 position = page * PAGE + slot;
#pragma unroll
                for (u32 i = 0; i < QUERIES; i++) {
                    if (n + i >= count || position < from[i] || position >= until[i]) continue;
                    const float weight = weights[(n + i) * PAGE + slot];
#pragma unroll
                    for (u32 o = 0; o < 8; o++) acc[i][o] = fused(weight, eight[o], acc[i][o]);
                }
            }
#pragma unroll
            for (u32 i = 0; i < QUERIES; i++) {
                if (n + i >= count || !of.sees_page(of.row(first + n + i), page)) continue;
                float* const to = numerators + (of.number(first + n + i) * of.span + blockIdx.x) * value_dim + at;
#pragma unroll
                for (u32 o = 0; o < 8; o++) {
                    if (at + o < value_dim) to[o] = acc[i][o];
                }
            }
        }
    }
}

#define ROWS_ARGUMENTS                                                                                                       \
    const u32 *__restrict__ positions, const u32 *__restrict__ first_row, const u32 *__restrict__ first_page,                \
        const u32 *__restrict__ table, const byte *__restrict__ cache, u64 page_bytes, u32 heads, u32 kv_heads, u32 window,  \
        u32 span
#define THESE_ROWS Rows{positions, first_row, first_page, table, cache, page_bytes, heads, kv_heads, window, span}

// Adds the pages of each query up. A block for each z (y) and query head (x), a thread for a dimension.
KERNEL attention_sum(ROWS_ARGUMENTS, const float* __restrict__ maxima, const float* __restrict__ sinks,
                     const float* __restrict__ numerators, const float* __restrict__ denominators, float* __restrict__ out,
                     u32 value_dim) {
    const Rows of = THESE_ROWS;
    const u32 head = blockIdx.x, base = of.base(blockIdx.y);
    for (u32 row = first_row[blockIdx.y]; row < first_row[blockIdx.y + 1]; row++) {
        const u64 number = u64(row) * heads + head;
        const u32 first = of.seen_from(row) / PAGE - base, end = pieces(of.seen_until(row), PAGE) - base;
        const float* const dens = denominators + number * span;
        float den = dens[first];
        for (u32 page = first + 1; page < end; page++) den += dens[page];
        if (sinks != nullptr) {
            const float peak = largest_of_pages(maxima + number * span, span, sinks + head);
            den = den + exponential(sinks[head] - peak);
        }
        for (u32 d = threadIdx.x; d < value_dim; d += blockDim.x) {
            const float* const nums = numerators + number * span * value_dim + d;
            float num = nums[u64(first) * value_dim];
            for (u32 page = first + 1; page < end; page++) num += nums[u64(page) * value_dim];
            out[number * value_dim + d] = num / den;
        }
    }
}

#define ATTENTION(T, name)                                                                                                   \
    KERNEL write_cache_##name(const float* values, const u32* positions, const u32* pages, byte* cache, u64 page_bytes,      \
                              u64 at, u32 heads, u32 dim) {                                                                  \
        write_cache<T>(values, positions, pages, cache, page_bytes, at, heads, dim);                                         \
    }                                                                                                                        \
    KERNEL __launch_bounds__(SCORE_THREADS, 4)                                                                               \
        attention_scores_##name(ROWS_ARGUMENTS, const float* q, float* scores, float* maxima, u64 keys_at, u32 key_dim,      \
                                float scale) {                                                                               \
        score<T>(THESE_ROWS, q, scores, maxima, keys_at, key_dim, scale);                                                    \
    }                                                                                                                        \
    KERNEL __launch_bounds__(MIX_THREADS, 2)                                                                                 \
        attention_mix_##name(ROWS_ARGUMENTS, const float* scores, const float* maxima, const float* sinks,                   \
                             float* numerators, float* denominators, u64 values_at, u32 stride, u32 value_dim) {             \
        mix<T>(THESE_ROWS, scores, maxima, sinks, numerators, denominators, values_at, stride, value_dim);                   \
    }

ATTENTION(F32, f32)
ATTENTION(Bf16, bf16)
ATTENTION(F16, f16)
