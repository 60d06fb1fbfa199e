// Rule 8: products with matrices of integers, q8 and q4, whose inputs are quantised too; and rows of such a table, embedded.
//
// Dots of a group are exact, so many are taken at once, in any order; what is added to what is fixed for the factors alone.
#include "products.cuh"

constexpr u32 GROUP = 32;
// Words of four inputs in a group.
constexpr u32 WORDS = GROUP / 4;
// Groups that a block of few rows has at once: four threads have one, four outputs each.
constexpr u32 TOGETHER = LINEAR_THREADS / 4;
// Groups that a block of many rows brings to shared memory at once, and the distance of its rows there: a multiple of four words, so
// that copies are of sixteen bytes, of which the banks are other ones for four neighbours.
constexpr u32 DEPTH = 4;
constexpr u32 X_STRIDE = DEPTH * WORDS + 8;
constexpr u32 GROUPED_THREADS = 128;

// Quantises rows of x (those picked, if `picked` is not null): four integers a word, a scale for each group. A warp has a group, a
// block eight of the row that its y says.
KERNEL __launch_bounds__(LINEAR_THREADS) quantise(const float* __restrict__ x, const u32* __restrict__ picked,
                                                  u32* __restrict__ words, float* __restrict__ scales, u32 inputs) {
    const u32 row = picked == nullptr ? blockIdx.y : picked[blockIdx.y], lane = threadIdx.x % WARP;
    const u32 group = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, groups = pieces(inputs, GROUP);
    if (group >= groups) return;
    const u32 k = group * GROUP + lane;
    const float value = k < inputs ? x[u64(row) * inputs + k] : 0.0f;
    // As integers, magnitudes have the order of the floats, and NaN is above all.
    u32 largest = __float_as_uint(value) & 0x7fffffffu;
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const u32 other = __shfl_xor_sync(ALL, largest, lanes);
        largest = other > largest ? other : largest;
    }
    const bool finite = largest < 0x7f800000u;
    const float scale = finite ? __uint_as_float(largest) / 127.0f : __uint_as_float(0x7fc00000u);
    int integer = 0;
    if (finite && scale != 0.0f) {
        const float to_integer = 12582912.0f;
        integer = int(__float_as_uint(value / scale + to_integer) - __float_as_uint(to_integer));
        integer = integer < -127 ? -127 : integer > 127 ? 127 : integer;
    }
    u32 word = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) word |= (u32(__shfl_sync(ALL, integer, (lane & ~3u) + i)) & 0xffu) << (8 * i);
    const u64 at = u64(blockIdx.y) * groups + group;
    if (lane % 4 == 0) words[at * WORDS + lane / 4] = word;
    if (lane == 0) scales[at] = scale;
}

// Four integers in a word, as signed bytes: of q8 the word less its bias, of q4 the low or the high halves.
__device__ __forceinline__ u32 without_bias_of_8(u32 word) { return word ^ 0x80808080u; }
__device__ __forceinline__ u32 without_bias_of_4(u32 halves) {
    // 128 more, so that no byte borrows from the next.
    return ((halves | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}

struct Q8 {
    static constexpr u32 CODES = GROUP;
    // Sixteen bytes are four inputs of four outputs.
    static constexpr u32 VECTORS = WORDS;
    static __device__ __forceinline__ uint4 low(uint4 w) {
        return {without_bias_of_8(w.x), without_bias_of_8(w.y), without_bias_of_8(w.z), without_bias_of_8(w.w)};
    }
    // There are none.
    static __device__ __forceinline__ uint4 high(uint4 w) { return w; }
};

struct Q4 {
    static constexpr u32 CODES = GROUP / 2;
    // And four more, sixteen inputs further.
    static constexpr u32 VECTORS = WORDS / 2;
    static __device__ __forceinline__ u32 halves(u32 word, u32 by) { return without_bias_of_4(word >> by & 0x0f0f0f0fu); }
    static __device__ __forceinline__ uint4 low(uint4 w) { return {halves(w.x, 0), halves(w.y, 0), halves(w.z, 0), halves(w.w, 0)}; }
    static __device__ __forceinline__ uint4 high(uint4 w) { return {halves(w.x, 4), halves(w.y, 4), halves(w.z, 4), halves(w.w, 4)}; }
};

// Where a group of a tile has its scales and its integers: two groups stand together, a last one without a partner alone.
template <class Q>
struct Place {
    static constexpr u32 SCALES = 2 * TILE, CODES = TILE * Q::CODES;
    static constexpr u32 QUAD = 16, VECTOR = TILE / 4 * QUAD;

    static __device__ __forceinline__ const byte* tile(const Products& of, u32 tile) {
        return of.weights + of.weights_at[blockIdx.z] + u64(tile) * pieces(of.inputs, GROUP) * (SCALES + CODES);
    }
    static __device__ __forceinline__ u32 scales(u32 group) { return group / 2 * 2 * (SCALES + CODES) + group % 2 * SCALES; }
    static __device__ __forceinline__ u32 codes(u32 group, bool alone) {
        return group / 2 * 2 * (SCALES + CODES) + (alone ? SCALES : 2 * SCALES) + group % 2 * CODES;
    }
};

// The scales of four outputs.
__device__ __forceinline__ float4 scales_of(const byte* at) {
    const uint2 words = *reinterpret_cast<const uint2*>(at);
    float4 four;
    F16::pair(words.x, four.x, four.y);
    F16::pair(words.y, four.z, four.w);
    return four;
}

__device__ __forceinline__ void add_dots(int* dots, uint4 w, u32 x) {
    dots[0] = __dp4a(int(w.x), int(x), dots[0]);
    dots[1] = __dp4a(int(w.y), int(x), dots[1]);
    dots[2] = __dp4a(int(w.z), int(x), dots[2]);
    dots[3] = __dp4a(int(w.w), int(x), dots[3]);
}

// A product of integers, a warp's, and `start`: 16 rows by 8 columns of 32 signed bytes each, eight words. Lane l has of rows l / 4 and
// l / 4 + 8 their words l % 4 (a[0], a[1]) and l % 4 + 4 (a[2], a[3]); of column l / 4 the same two words; and gets the sums of
// both rows with columns l % 4 * 2 (c[0], c[2]) and the next (c[1], c[3]): as mma.sync has them.
__device__ __forceinline__ void multiply(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2], int start) {
#if !defined(LITE_LLM_SHIM) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start));
#else
    // The same by shuffles, for a CPU and for devices that have no such instruction.
    const auto both = [](u32 low, u32 high) { return u64(high) << 32 | low; };
    const u32 row = threadIdx.x % WARP & ~3u, column = threadIdx.x % 4 * 8;
    c[0] = c[1] = c[2] = c[3] = start;
    for (u32 i = 0; i < 4; i++) {
        const u64 rows[2] = {__shfl_sync(ALL, both(a[0], a[2]), row + i), __shfl_sync(ALL, both(a[1], a[3]), row + i)};
        const u64 columns[2] = {__shfl_sync(ALL, both(b[0], b[1]), column + i), __shfl_sync(ALL, both(b[0], b[1]), column + 4 + i)};
        for (u32 n = 0; n < 4; n++) {
            c[n] = __dp4a(int(u32(rows[n / 2])), int(u32(columns[n % 2])), c[n]);
            c[n] = __dp4a(int(u32(rows[n / 2] >> 32)), int(u32(columns[n % 2] >> 32)), c[n]);
        }
    }
#endif
}

// Dots begin with the bits of 1.5 * 2^23, whose last place is one: then they are the bits of that number and the dot, which is below
// 2^20, and one subtraction makes a float of them, exactly. A conversion would take longer.
constexpr int NO_DOT = 0x4b400000;
__device__ __forceinline__ float dot_of(int dot) { return __uint_as_float(u32(dot)) - __uint_as_float(u32(NO_DOT)); }

// Few rows: a block has a tile of outputs (x) and `ROWS` rows (y). Its threads take the dots of 64 groups, then one for each output
// and row adds them up.
template <class Q, u32 ROWS>
__device__ __forceinline__ void few_rows_of_groups(const Products& of, const u32* __restrict__ words) {
    SHARED(float, factors, TOGETHER* ROWS* TILE);
    SHARED(float, dots_of, TOGETHER* ROWS* TILE);
    const u32 row = blockIdx.y * ROWS, rows = of.rows(), groups = pieces(of.inputs, GROUP), tile = blockIdx.x;
    const u32 quad = threadIdx.x % 4;
    if (row >= rows) return;
    const byte* const weights = Place<Q>::tile(of, tile);
    float acc = 0.0f;
    for (u32 first = 0; first < groups; first += TOGETHER) {
        const u32 group = first + threadIdx.x / 4;
        if (group < groups) {
            const float4 d = scales_of(weights + Place<Q>::scales(group) + quad * 8);
            const byte* const from = weights + Place<Q>::codes(group, (group | 1u) == groups) + quad * Place<Q>::QUAD;
            uint4 w[WORDS];
#pragma unroll
            for (u32 v = 0; v < Q::VECTORS; v++) {
                const uint4 codes = load16(from + v * Place<Q>::VECTOR);
                w[v] = Q::low(codes);
                if (Q::VECTORS < WORDS) w[Q::VECTORS % WORDS + v] = Q::high(codes);
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                const u64 at = (u64(of.first()) + smaller(row + r, rows - 1)) * groups + group;
                const uint4 a = load16(words + at * WORDS), b = load16(words + at * WORDS + 4);
                const u32 x[WORDS] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
                int dots[4] = {NO_DOT, NO_DOT, NO_DOT, NO_DOT};
#pragma unroll
                for (u32 v = 0; v < WORDS; v++) add_dots(dots, w[v], x[v]);
                const float s = of.x[at];
                const u32 to = (threadIdx.x / 4 * ROWS + r) * TILE + quad * 4;
                *reinterpret_cast<float4*>(factors + to) = make_float4(d.x * s, d.y * s, d.z * s, d.w * s);
                *reinterpret_cast<float4*>(dots_of + to) =
                    make_float4(dot_of(dots[0]), dot_of(dots[1]), dot_of(dots[2]), dot_of(dots[3]));
            }
        }
        __syncthreads();
        if (threadIdx.x < ROWS * TILE) {
#pragma unroll 8
            for (u32 i = 0; i < smaller(TOGETHER, groups - first); i++) {
                const u32 at = i * ROWS * TILE + threadIdx.x;
                acc = fused(factors[at], dots_of[at], acc);
            }
        }
        __syncthreads();
    }
    const u32 r = row + threadIdx.x / TILE, output = tile * TILE + threadIdx.x % TILE;
    if (threadIdx.x < ROWS * TILE && r < rows && output < of.outputs) of.put(r, output, acc);
}

__device__ __forceinline__ void load_pair(u32* to, const u32* from) {
    const uint2 pair = *reinterpret_cast<const uint2*>(from);
    to[0] = pair.x, to[1] = pair.y;
}
__device__ __forceinline__ void load_pair(float* to, const float* from) {
    const uint2 pair = *reinterpret_cast<const uint2*>(from);
    to[0] = __uint_as_float(pair.x), to[1] = __uint_as_float(pair.y);
}

// Many rows: a block has 64 outputs (x) and `HIGH` rows (y). A warp has 32 of the rows with 16 * `WIDE` outputs: four by `WIDE` products
// of the warp for each group, which are its dots. While four groups are multiplied, the next come to shared memory.
template <class Q, u32 HIGH, u32 WIDE>
__device__ __forceinline__ void many_rows_of_groups(const Products& of, const u32* __restrict__ words) {
    constexpr u32 QUADS = TILE / 4, TILES = SPAN / TILE, ACROSS = SPAN / (16 * WIDE);
    constexpr u32 VECTORS = DEPTH * Q::VECTORS * SPAN / 4 / GROUPED_THREADS;
    static_assert(GROUPED_THREADS / WARP == HIGH / 32 * ACROSS, "every warp has a part");
    SHARED(u32, ws, 2 * DEPTH * WORDS * STRIDE);
    SHARED(u32, xs, 2 * HIGH * X_STRIDE);
    SHARED(float, ds, 2 * DEPTH * SPAN);
    SHARED(float, ss, 2 * DEPTH * HIGH);
    const u32 row = blockIdx.y * HIGH, rows = of.rows(), groups = pieces(of.inputs, GROUP);
    if (row >= rows) return;
    const u32 lane = threadIdx.x % WARP, part = threadIdx.x / WARP, word = lane % 4 * 2;
    const u32 top = part / ACROSS * 32, left = part % ACROSS * 16 * WIDE;
    const bool works = row + top < rows;
    // What is beyond the last row or tile is the last one's, and goes nowhere.
    const auto group_in_row = [&](u32 r) { return (u64(of.first()) + smaller(row + r, rows - 1)) * groups; };
    const auto tile = [&](u32 t) { return Place<Q>::tile(of, smaller(blockIdx.x * TILES + t, pieces(of.outputs, TILE) - 1)); };

    // A thread copies sixteen bytes of several rows, half a group each, and a scale of several.
    constexpr u32 HALVES = 2 * DEPTH, HALF_ROWS = GROUPED_THREADS / HALVES, SCALE_ROWS = GROUPED_THREADS / DEPTH;
    const u32 half = threadIdx.x % HALVES, half_row = threadIdx.x / HALVES, own = threadIdx.x % DEPTH, scale_row = threadIdx.x / DEPTH;
    const u32* halves[HIGH / HALF_ROWS];
    const float* scales[HIGH / SCALE_ROWS];
#pragma unroll
    for (u32 n = 0; n < HIGH / HALF_ROWS; n++) halves[n] = words + group_in_row(half_row + n * HALF_ROWS) * WORDS + half * 4;
#pragma unroll
    for (u32 n = 0; n < HIGH / SCALE_ROWS; n++) scales[n] = of.x + group_in_row(scale_row + n * SCALE_ROWS) + own;
    const auto copy_inputs = [&](u32 first, u32 to) {
        u32* const x_at = xs + (to * HIGH + half_row) * X_STRIDE + half * 4;
        float* const s_at = ss + (to * DEPTH + own) * HIGH + scale_row;
        if (first + half / 2 < groups) {
#pragma unroll
            for (u32 n = 0; n < HIGH / HALF_ROWS; n++) copy_async<16>(x_at + n * HALF_ROWS * X_STRIDE, halves[n] + first * WORDS);
        }
        if (first + own < groups) {
#pragma unroll
            for (u32 n = 0; n < HIGH / SCALE_ROWS; n++) copy_async<4>(s_at + n * SCALE_ROWS, scales[n] + first);
        }
    };
    // It loads sixteen bytes of the integers of several groups of a tile, and some threads four scales of a group.
    const u32 quad = threadIdx.x % QUADS, v = threadIdx.x / QUADS % Q::VECTORS, t = threadIdx.x / (QUADS * Q::VECTORS) % TILES;
    const u32 group = threadIdx.x / (QUADS * Q::VECTORS * TILES), scaled_tile = threadIdx.x / QUADS % TILES;
    const u32 scaled = threadIdx.x / (QUADS * TILES);
    const byte* const weights = tile(t) + v * Place<Q>::VECTOR + quad * Place<Q>::QUAD;
    const byte* const factors = tile(scaled_tile) + Place<Q>::scales(scaled) + quad * 8;
    uint4 codes[VECTORS] = {};
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto load_weights = [&](u32 first) {
        const u64 stage = u64(first) * (Place<Q>::SCALES + Place<Q>::CODES);
#pragma unroll
        for (u32 n = 0; n < VECTORS; n++) {
            const u32 g = group + n * DEPTH / VECTORS;
            if (first + g < groups) codes[n] = load16(weights + stage + Place<Q>::codes(g, ((first + g) | 1u) == groups));
        }
        if (scaled < DEPTH && first + scaled < groups) four = scales_of(factors + stage);
    };
    const auto put_weights = [&](u32 to) {
#pragma unroll
        for (u32 n = 0; n < VECTORS; n++) {
            u32* const at = ws + ((to * DEPTH + group + n * DEPTH / VECTORS) * WORDS + v) * STRIDE + t * TILE + quad * 4;
            *reinterpret_cast<uint4*>(at) = Q::low(codes[n]);
            if (Q::VECTORS < WORDS) *reinterpret_cast<uint4*>(at + Q::VECTORS * STRIDE) = Q::high(codes[n]);
        }
        if (scaled < DEPTH) *reinterpret_cast<float4*>(ds + (to * DEPTH + scaled) * SPAN + scaled_tile * TILE + quad * 4) = four;
    };

    // Of a lane's outputs and rows, each two neighbours of every product.
    float acc[WIDE][4][4] = {};
    copy_inputs(0, 0);
    load_weights(0);
    put_weights(0);
    wait_for_copies();
    __syncthreads();
    for (u32 first = 0, at = 0; first < groups; first += DEPTH, at ^= 1) {
        const bool more = first + DEPTH < groups;
        if (more) {
            copy_inputs(first + DEPTH, at ^ 1);
            load_weights(first + DEPTH);
        }
        const u32* w_at = ws + (at * DEPTH * WORDS + word) * STRIDE + left + lane / 4 * 2;
        const u32* x_at = xs + (at * HIGH + top + lane / 4) * X_STRIDE + word;
        const float* d_at = ds + at * DEPTH * SPAN + left + lane / 4 * 2;
        const float* s_at = ss + at * DEPTH * HIGH + top + lane % 4 * 2;
        const u32 depth = works ? smaller(DEPTH, groups - first) : 0;
        for (u32 g = 0; g < depth; g++) {
            // Which words of a group meet is the same on both sides: two neighbours, where the product has two that are four apart. Rows
            // that it has eight apart are neighbours here.
            u32 w[WIDE][4], x[4][2];
            float d[WIDE][2], s[4][2];
#pragma unroll
            for (u32 o = 0; o < WIDE; o++) {
                load_pair(w[o], w_at + o * 16);
                load_pair(w[o] + 2, w_at + STRIDE + o * 16);
                load_pair(d[o], d_at + o * 16);
            }
#pragma unroll
            for (u32 r = 0; r < 4; r++) {
                load_pair(x[r], x_at + r * 8 * X_STRIDE);
                load_pair(s[r], s_at + r * 8);
            }
            w_at += WORDS * STRIDE, x_at += WORDS, d_at += SPAN, s_at += HIGH;
#pragma unroll
            for (u32 o = 0; o < WIDE; o++) {
#pragma unroll
                for (u32 r = 0; r < 4; r++) {
                    int dots[4];
                    multiply(dots, w[o], x[r], NO_DOT);
#pragma unroll
                    for (u32 i = 0; i < 4; i++) acc[o][r][i] = fused(d[o][i / 2] * s[r][i % 2], dot_of(dots[i]), acc[o][r][i]);
                }
            }
        }
        if (more) put_weights(at ^ 1);
        wait_for_copies();
        __syncthreads();
    }
#pragma unroll
    for (u32 o = 0; o < WIDE; o++) {
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            const u32 output = blockIdx.x * SPAN + left + o * 16 + lane / 4 * 2 + i % 4 / 2;
            const u32 r = row + top + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (r < rows && output < of.outputs) of.put(r, output, acc[o][i / 4][i % 4]);
        }
    }
}

// Rows of a table of groups: a scale, then the integers, of q4 two in a byte, sixteen values apart.
template <class Q>
__device__ __forceinline__ void embed_groups(const byte* __restrict__ table, const u32* __restrict__ tokens,
                                             float* __restrict__ out, u32 hidden, float multiplier) {
    const u64 row = u64(tokens[blockIdx.x]) * pieces(hidden, GROUP) * (2 + Q::CODES);
    for (u32 at = threadIdx.x; at < hidden; at += blockDim.x) {
        const byte* const group = table + row + at / GROUP * (2 + Q::CODES);
        const u32 code = group[2 + at % Q::CODES];
        const int integer = Q::CODES == GROUP ? int(code ^ 0x80u) - 128 : int(code >> (at % GROUP / Q::CODES * 4) & 15u) - 8;
        out[u64(blockIdx.x) * hidden + at] = float(integer) * F16::value(group) * multiplier;
    }
}

#define GROUPED(Q, name)                                                                                                  \
    KERNEL embed_##name(const byte* table, const u32* tokens, float* out, u32 hidden, float multiplier) {                 \
        embed_groups<Q>(table, tokens, out, hidden, multiplier);                                                          \
    }                                                                                                                     \
    KERNEL __launch_bounds__(LINEAR_THREADS) linear_one_row_##name(PRODUCTS_ARGUMENTS, const u32* words) {                \
        few_rows_of_groups<Q, 1>(PRODUCTS, words);                                                                        \
    }                                                                                                                     \
    KERNEL __launch_bounds__(LINEAR_THREADS) linear_few_rows_##name(PRODUCTS_ARGUMENTS, const u32* words) {               \
        few_rows_of_groups<Q, 4>(PRODUCTS, words);                                                                        \
    }                                                                                                                     \
    KERNEL __launch_bounds__(GROUPED_THREADS, 4) linear_some_rows_##name(PRODUCTS_ARGUMENTS, const u32* words) {             \
        many_rows_of_groups<Q, SPAN / 2, 1>(PRODUCTS, words);                                                             \
    }                                                                                                                     \
    KERNEL __launch_bounds__(GROUPED_THREADS, 3) linear_many_rows_##name(PRODUCTS_ARGUMENTS, const u32* words) {             \
        many_rows_of_groups<Q, SPAN, 2>(PRODUCTS, words);                                                                 \
    }

GROUPED(Q8, q8)
GROUPED(Q4, q4)
