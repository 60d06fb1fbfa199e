// Rule 8: products with matrices of integers, q8 and q4, whose inputs are quantised too; and rows of such a table, embedded.
//
// Dots of a group are exact, so many are taken at once, in any order; what is added to what is fixed for the factors alone.
#include "products.cuh"

constexpr u32 GROUP = 32;
// Words of four inputs in a group.
constexpr u32 WORDS = GROUP / 4;
// Groups that a block of few rows has at once: four threads have one, four outputs each.
constexpr u32 TOGETHER = LINEAR_THREADS / 4;
// Groups that a block of many rows brings to shared memory at once.
constexpr u32 DEPTH = 4;

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

// Where a group of a tile has its scales and its integers: two groups stand together.
template <class Q>
struct Place {
    const byte* scales;
    const byte* codes;

    __device__ __forceinline__ Place(const Products& of, u32 tile, u32 group) {
        constexpr u32 SCALES = 2 * TILE, CODES = TILE * Q::CODES;
        const u32 groups = pieces(of.inputs, GROUP), together = (group | 1u) < groups ? 2 : 1;
        const byte* const start = of.weights + of.weights_at[blockIdx.z] + (u64(tile) * groups + group / 2 * 2) * (SCALES + CODES);
        scales = start + group % 2 * SCALES;
        codes = start + together * SCALES + group % 2 * CODES;
    }
    // Of four outputs.
    __device__ __forceinline__ float4 scales_of(u32 quad) const {
        const uint2 words = *reinterpret_cast<const uint2*>(scales + quad * 8);
        float4 four;
        F16::pair(words.x, four.x, four.y);
        F16::pair(words.y, four.z, four.w);
        return four;
    }
    __device__ __forceinline__ uint4 load(u32 vector, u32 quad) const { return load16(codes + vector * 64 + quad * 16); }
};

__device__ __forceinline__ void add_dots(int* dots, uint4 w, u32 x) {
    dots[0] = __dp4a(int(w.x), int(x), dots[0]);
    dots[1] = __dp4a(int(w.y), int(x), dots[1]);
    dots[2] = __dp4a(int(w.z), int(x), dots[2]);
    dots[3] = __dp4a(int(w.w), int(x), dots[3]);
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
    float acc = 0.0f;
    for (u32 first = 0; first < groups; first += TOGETHER) {
        const u32 group = first + threadIdx.x / 4;
        if (group < groups) {
            const Place<Q> place(of, tile, group);
            const float4 d = place.scales_of(quad);
            uint4 w[WORDS];
#pragma unroll
            for (u32 v = 0; v < Q::VECTORS; v++) {
                const uint4 codes = place.load(v, quad);
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

// Many rows: a block has 64 outputs (x) and `HIGH` rows (y), a thread four by four of them; four groups are in shared memory at once.
template <class Q, u32 HIGH>
__device__ __forceinline__ void many_rows_of_groups(const Products& of, const u32* __restrict__ words) {
    constexpr u32 THREADS = SPAN / 4 * (HIGH / 4), X_STRIDE = HIGH + 4;
    SHARED(u32, ws, DEPTH* WORDS* STRIDE);
    SHARED(u32, xs, DEPTH* WORDS* X_STRIDE);
    SHARED(float, ds, DEPTH* SPAN);
    SHARED(float, ss, DEPTH* HIGH);
    const u32 row = blockIdx.y * HIGH, rows = of.rows(), groups = pieces(of.inputs, GROUP), tiles = pieces(of.outputs, TILE);
    const u32 left = threadIdx.x % 16 * 4, top = threadIdx.x / 16 * 4;
    if (row >= rows) return;
    float acc[4][4] = {};
    for (u32 first = 0; first < groups; first += DEPTH) {
        const u32 depth = smaller(DEPTH, groups - first);
        for (u32 i = threadIdx.x; i < DEPTH * 4 * Q::VECTORS * 4; i += THREADS) {
            // Neighbours read what lies together: the quads of a vector, then the vectors of a tile.
            const u32 quad = i % 4, v = i / 4 % Q::VECTORS, t = i / (4 * Q::VECTORS) % 4, g = i / (16 * Q::VECTORS);
            const u32 tile = blockIdx.x * 4 + t;
            if (g >= depth) continue;
            u32* const to = ws + (g * WORDS + v) * STRIDE + t * TILE + quad * 4;
            uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
            if (tile < tiles) {
                const uint4 codes = Place<Q>(of, tile, first + g).load(v, quad);
                low = Q::low(codes), high = Q::high(codes);
            }
            *reinterpret_cast<uint4*>(to) = low;
            if (Q::VECTORS < WORDS) *reinterpret_cast<uint4*>(to + Q::VECTORS * STRIDE) = high;
        }
        for (u32 i = threadIdx.x; i < HIGH * DEPTH * 2; i += THREADS) {
            const u32 half = i % 2, g = i / 2 % DEPTH, r = i / (2 * DEPTH);
            if (g >= depth) continue;
            uint4 x = {0, 0, 0, 0};
            if (row + r < rows) x = load16(words + ((u64(of.first()) + row + r) * groups + first + g) * WORDS + half * 4);
            u32* const to = xs + (g * WORDS + half * 4) * X_STRIDE + r;
            to[0] = x.x, to[X_STRIDE] = x.y, to[2 * X_STRIDE] = x.z, to[3 * X_STRIDE] = x.w;
        }
        {
            // A thread has a scale of each side: of a row, and where the first quarter is, of four outputs.
            const u32 g = threadIdx.x % DEPTH, r = threadIdx.x / DEPTH;
            if (g < depth) ss[g * HIGH + r] = row + r < rows ? of.x[(u64(of.first()) + row + r) * groups + first + g] : 0.0f;
            const u32 quad = threadIdx.x / DEPTH % 4, t = threadIdx.x / (4 * DEPTH);
            if (threadIdx.x < SPAN && g < depth) {
                float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (blockIdx.x * 4 + t < tiles) four = Place<Q>(of, blockIdx.x * 4 + t, first + g).scales_of(quad);
                *reinterpret_cast<float4*>(ds + g * SPAN + t * TILE + quad * 4) = four;
            }
        }
        __syncthreads();
        for (u32 g = 0; g < depth; g++) {
            int dots[4][4];
#pragma unroll
            for (u32 i = 0; i < 16; i++) dots[i / 4][i % 4] = NO_DOT;
#pragma unroll
            for (u32 v = 0; v < WORDS; v++) {
                const uint4 w = load16(ws + (g * WORDS + v) * STRIDE + left), x = load16(xs + (g * WORDS + v) * X_STRIDE + top);
                add_dots(dots[0], w, x.x);
                add_dots(dots[1], w, x.y);
                add_dots(dots[2], w, x.z);
                add_dots(dots[3], w, x.w);
            }
            const float4 d4 = load_float4(ds + g * SPAN + left), s4 = load_float4(ss + g * HIGH + top);
            const float d[4] = {d4.x, d4.y, d4.z, d4.w}, s[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
            for (u32 r = 0; r < 4; r++) {
#pragma unroll
                for (u32 o = 0; o < 4; o++) acc[r][o] = fused(d[o] * s[r], dot_of(dots[r][o]), acc[r][o]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 r = 0; r < 4; r++) {
#pragma unroll
        for (u32 o = 0; o < 4; o++) {
            const u32 output = blockIdx.x * SPAN + left + o;
            if (row + top + r < rows && output < of.outputs) of.put(row + top + r, output, acc[r][o]);
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
    KERNEL __launch_bounds__(128, 5) linear_some_rows_##name(PRODUCTS_ARGUMENTS, const u32* words) {                         \
        many_rows_of_groups<Q, SPAN / 2>(PRODUCTS, words);                                                                \
    }                                                                                                                     \
    KERNEL __launch_bounds__(256, 3) linear_many_rows_##name(PRODUCTS_ARGUMENTS, const u32* words) {                         \
        many_rows_of_groups<Q, SPAN>(PRODUCTS, words);                                                                    \
    }

GROUPED(Q8, q8)
GROUPED(Q4, q4)
