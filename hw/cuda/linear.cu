// Rule 2: matrix products with packed weights (docs/numerics.md, "Packed weights"), as they lie in slots.
//
// Inputs are repacked once, lane by lane, so that a thread that has a lane reads four steps at a time. A grid has a product for
// each z: an expert with its rows, or a matrix with all of them. Weights lie at multiples of sixteen bytes.
#include "products.cuh"

// Puts rows of x (those picked, if `picked` is not null) in the order chunk, lane, step, padded with zeros to whole chunks.
// A block for each chunk (x) and row (y).
KERNEL __launch_bounds__(LINEAR_THREADS) repack(const float* __restrict__ x, const u32* __restrict__ picked,
                                                float* __restrict__ out, u32 inputs) {
    SHARED(float, chunk, LANES*(STEPS + 1));
    const u32 row = picked == nullptr ? blockIdx.y : picked[blockIdx.y];
    const u32 start = blockIdx.x * CHUNK;
    for (u32 at = threadIdx.x; at < CHUNK; at += blockDim.x) {
        const float value = start + at < inputs ? x[u64(row) * inputs + start + at] : 0.0f;
        chunk[at % LANES * (STEPS + 1) + at / LANES] = value;
    }
    __syncthreads();
    out += (u64(blockIdx.y) * gridDim.x + blockIdx.x) * CHUNK;
    for (u32 at = threadIdx.x; at < CHUNK; at += blockDim.x) out[at] = chunk[at / STEPS * (STEPS + 1) + at % STEPS];
}

// Storages: of an entry of a chunk, which of `steps` a lane, a half has eight outputs: four from `low` on and four from `high` on.
template <class T>
struct Plain {
    static constexpr u32 ENTRY = TILE * T::BYTES;
    static __device__ __forceinline__ u32 factor_bytes(u32) { return 0; }
    static __device__ __forceinline__ u32 low(u32 half) { return T::BYTES == 4 ? half * 8 : half * 4; }
    static __device__ __forceinline__ u32 high(u32 half) { return T::BYTES == 4 ? half * 8 + 4 : half * 4 + 8; }
    static __device__ __forceinline__ void load(const byte* chunk, u32 steps, u32 lane, u32 step, u32 half, float* out) {
        const byte* const entry = chunk + (lane * steps + step) * ENTRY + half * (ENTRY / 2);
        if (T::BYTES == 4) {
            T::eight(entry, out);
        } else {
            // A word holds an output and the one eight further.
            float mixed[8];
            T::eight(entry, mixed);
#pragma unroll
            for (u32 i = 0; i < 4; i++) out[i] = mixed[2 * i], out[4 + i] = mixed[2 * i + 1];
        }
    }
};

// Four bits a weight, and for each 32 inputs and each output half of the power of two that they are multiplied with.
struct Mxfp4 {
    static constexpr u32 ENTRY = TILE / 2, BLOCK = 32;
    static __device__ __forceinline__ u32 factor_bytes(u32 entries) { return pieces(entries, BLOCK) * TILE * 2; }
    static __device__ __forceinline__ u32 low(u32 half) { return half * 4; }
    static __device__ __forceinline__ u32 high(u32 half) { return half * 4 + 8; }
    // Twice the value of four bits, exactly: one of sign, two of exponent, one of fraction.
    static __device__ __forceinline__ float doubled(u32 code) {
        const float magnitude = __uint_as_float((code & 7u) << 22) * power_of_two(127);
        return __uint_as_float(__float_as_uint(magnitude) | (code & 8u) << 28);
    }
    static __device__ __forceinline__ void load(const byte* chunk, u32 steps, u32 lane, u32 step, u32 half, float* out) {
        const byte* const entry = chunk + factor_bytes(steps * LANES) + (lane * steps + step) * ENTRY + half * 4;
        const u32 codes = *reinterpret_cast<const u32*>(entry);
        const byte* const factors = chunk + (step * LANES + lane) / BLOCK * TILE * 2 + half * 8;
        const uint2 lows = *reinterpret_cast<const uint2*>(factors), highs = *reinterpret_cast<const uint2*>(factors + 16);
        float by[8];
        Bf16::pair(lows.x, by[0], by[1]);
        Bf16::pair(lows.y, by[2], by[3]);
        Bf16::pair(highs.x, by[4], by[5]);
        Bf16::pair(highs.y, by[6], by[7]);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            out[i] = doubled(codes >> (8 * i)) * by[i];
            out[4 + i] = doubled(codes >> (8 * i + 4)) * by[4 + i];
        }
    }
};

// A byte a weight, and a factor for each 128 inputs: the published one times 256. A code that is no number has such a factor.
struct E4m3 {
    static constexpr u32 ENTRY = TILE, BLOCK = 128;
    static __device__ __forceinline__ u32 factor_bytes(u32 entries) { return pieces(entries, BLOCK) * 4; }
    static __device__ __forceinline__ u32 low(u32 half) { return half * 8; }
    static __device__ __forceinline__ u32 high(u32 half) { return half * 8 + 4; }
    // The value of a byte by 256, exactly: one of sign, four of exponent, three of fraction.
    static __device__ __forceinline__ float by_256(u32 code) {
        const float magnitude = __uint_as_float((code & 0x7fu) << 20) * power_of_two(112);
        return __uint_as_float(__float_as_uint(magnitude) | (code & 0x80u) << 24);
    }
    static __device__ __forceinline__ void load(const byte* chunk, u32 steps, u32 lane, u32 step, u32 half, float* out) {
        const byte* const entry = chunk + factor_bytes(steps * LANES) + (lane * steps + step) * ENTRY + half * 8;
        // Factors are words, so that entries begin at multiples of four bytes only.
        const u32 first = reinterpret_cast<const u32*>(entry)[0], second = reinterpret_cast<const u32*>(entry)[1];
        const float factor = reinterpret_cast<const float*>(chunk)[(step * LANES + lane) / BLOCK];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            out[i] = by_256(first >> (8 * i)) * factor;
            out[4 + i] = by_256(second >> (8 * i)) * factor;
        }
    }
};

__device__ __forceinline__ void add_step(float x, const float* w, float* acc) {
#pragma unroll
    for (u32 o = 0; o < 8; o++) acc[o] = fused(x, w[o], acc[o]);
}

// Few rows: a block has a tile of outputs (x) and `ROWS` rows (y), a warp a chunk, a thread a lane of eight outputs.
template <class S, u32 ROWS>
__device__ __forceinline__ void few_rows(const Products& of) {
    SHARED(float, folds, LINEAR_WARPS* LANES*(TILE + 1));
    SHARED(float, sums, LINEAR_WARPS* ROWS* TILE);
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP / 2, half = threadIdx.x % 2;
    const u32 row = blockIdx.y * ROWS, rows = of.rows(), chunks = of.chunks(), tile = blockIdx.x;
    // A grid is as high as its largest product.
    if (row >= rows) return;
    float total = 0.0f;
    for (u32 first = 0; first < chunks; first += LINEAR_WARPS) {
        const u32 chunk = first + warp;
        if (chunk < chunks) {
            const u32 steps = of.steps(chunk);
            const byte* const weights = of.chunk_of<S>(tile, chunk);
            float acc[ROWS][8] = {};
            u32 step = 0;
            // Whole fours without a condition between their loads, so that all of them are on their way together.
#pragma unroll 2
            for (; step + 4 <= steps; step += 4) {
                float w[4][8];
                float4 x[ROWS];
#pragma unroll
                for (u32 i = 0; i < 4; i++) S::load(weights, steps, lane, step + i, half, w[i]);
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) x[r] = load_float4(of.lane(smaller(row + r, rows - 1), chunk, lane) + step);
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    add_step(x[r].x, w[0], acc[r]);
                    add_step(x[r].y, w[1], acc[r]);
                    add_step(x[r].z, w[2], acc[r]);
                    add_step(x[r].w, w[3], acc[r]);
                }
            }
            for (; step < steps; step++) {
                float w[8];
                S::load(weights, steps, lane, step, half, w);
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) add_step(of.lane(smaller(row + r, rows - 1), chunk, lane)[step], w, acc[r]);
            }
            float* const fold = folds + warp * LANES * (TILE + 1);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                if (r > 0) __syncwarp();
#pragma unroll
                for (u32 o = 0; o < 4; o++) {
                    fold[lane * (TILE + 1) + S::low(half) + o] = acc[r][o];
                    fold[lane * (TILE + 1) + S::high(half) + o] = acc[r][4 + o];
                }
                __syncwarp();
                if (threadIdx.x % WARP < TILE) {
                    const u32 output = threadIdx.x % WARP;
                    float sum = fold[output];
#pragma unroll
                    for (u32 l = 1; l < LANES; l++) sum += fold[l * (TILE + 1) + output];
                    sums[(warp * ROWS + r) * TILE + output] = sum;
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < ROWS * TILE) {
            for (u32 i = 0; i < smaller(LINEAR_WARPS, chunks - first); i++) {
                const float sum = sums[i * ROWS * TILE + threadIdx.x];
                total = first + i == 0 ? sum : total + sum;
            }
        }
        __syncthreads();
    }
    const u32 r = row + threadIdx.x / TILE, output = tile * TILE + threadIdx.x % TILE;
    if (threadIdx.x < ROWS * TILE && r < rows && output < of.outputs) of.put(r, output, total);
}

// Many rows: a block has 64 outputs (x) and 64 rows (y), a thread four by four of them. One lane after another is brought to
// shared memory, widened, while the one before is added up.
template <class S>
struct Staged {
    static constexpr u32 HALVES = SPAN * STEPS / 8 / LINEAR_THREADS;
    static constexpr u32 FOURS = SPAN * STEPS / 4 / LINEAR_THREADS;
    float w[HALVES][8];
    float4 x[FOURS];

    static __device__ __forceinline__ u32 step_of_half(u32 i) { return i / 2 % STEPS; }
    static __device__ __forceinline__ u32 tile_of_half(u32 i) { return i / (2 * STEPS); }
    // Eight rows of 64 bytes are read by a warp: whole sectors, and two banks apart when they are written.
    static __device__ __forceinline__ u32 row_of_four(u32 i) { return i % 8 + i / 128 * 8; }
    static __device__ __forceinline__ u32 step_of_four(u32 i) { return i / 8 % 16 * 4; }

    __device__ __forceinline__ void fetch(const Products& of, u32 row, u32 chunk, u32 lane) {
        const u32 steps = of.steps(chunk), tiles = pieces(of.outputs, TILE);
#pragma unroll
        for (u32 n = 0; n < HALVES; n++) {
            const u32 i = threadIdx.x + n * LINEAR_THREADS, tile = blockIdx.x * (SPAN / TILE) + tile_of_half(i);
            for (u32 o = 0; o < 8; o++) w[n][o] = 0.0f;
            if (step_of_half(i) >= steps || tile >= tiles) continue;
            S::load(of.chunk_of<S>(tile, chunk), steps, lane, step_of_half(i), i % 2, w[n]);
        }
#pragma unroll
        for (u32 n = 0; n < FOURS; n++) {
            const u32 i = threadIdx.x + n * LINEAR_THREADS, r = row + row_of_four(i);
            x[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (r < of.rows()) x[n] = load_float4(of.lane(r, chunk, lane) + step_of_four(i));
        }
    }

    __device__ __forceinline__ void put(float* ws, float* xs) const {
#pragma unroll
        for (u32 n = 0; n < HALVES; n++) {
            const u32 i = threadIdx.x + n * LINEAR_THREADS;
            float* const to = ws + step_of_half(i) * STRIDE + tile_of_half(i) * TILE;
            const u32 low = S::low(i % 2), high = S::high(i % 2);
            *reinterpret_cast<float4*>(to + low) = make_float4(w[n][0], w[n][1], w[n][2], w[n][3]);
            *reinterpret_cast<float4*>(to + high) = make_float4(w[n][4], w[n][5], w[n][6], w[n][7]);
        }
#pragma unroll
        for (u32 n = 0; n < FOURS; n++) {
            const u32 i = threadIdx.x + n * LINEAR_THREADS;
            float* const to = xs + step_of_four(i) * STRIDE + row_of_four(i);
            to[0] = x[n].x, to[STRIDE] = x[n].y, to[2 * STRIDE] = x[n].z, to[3 * STRIDE] = x[n].w;
        }
    }
};

template <class S>
__device__ __forceinline__ void many_rows(const Products& of) {
    SHARED(float, ws, STEPS* STRIDE);
    SHARED(float, xs, STEPS* STRIDE);
    const u32 row = blockIdx.y * SPAN, left = threadIdx.x % 16 * 4, top = threadIdx.x / 16 * 4;
    if (row >= of.rows()) return;
    float sum[4][4] = {}, total[4][4] = {};
    Staged<S> staged;
    if (of.chunks() > 0) staged.fetch(of, row, 0, 0);
    for (u32 chunk = 0; chunk < of.chunks(); chunk++) {
        const u32 steps = of.steps(chunk);
        for (u32 lane = 0; lane < LANES; lane++) {
            staged.put(ws, xs);
            __syncthreads();
            const u32 next = lane + 1 == LANES ? chunk + 1 : chunk;
            if (next < of.chunks()) staged.fetch(of, row, next, (lane + 1) % LANES);
            float acc[4][4] = {};
#pragma unroll 4
            for (u32 step = 0; step < steps; step++) {
                const float4 x4 = load_float4(xs + step * STRIDE + top), w4 = load_float4(ws + step * STRIDE + left);
                const float x[4] = {x4.x, x4.y, x4.z, x4.w}, w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
                for (u32 r = 0; r < 4; r++) {
#pragma unroll
                    for (u32 o = 0; o < 4; o++) acc[r][o] = fused(x[r], w[o], acc[r][o]);
                }
            }
            __syncthreads();
#pragma unroll
            for (u32 r = 0; r < 4; r++) {
#pragma unroll
                for (u32 o = 0; o < 4; o++) sum[r][o] = lane == 0 ? acc[r][o] : sum[r][o] + acc[r][o];
            }
        }
#pragma unroll
        for (u32 r = 0; r < 4; r++) {
#pragma unroll
            for (u32 o = 0; o < 4; o++) total[r][o] = chunk == 0 ? sum[r][o] : total[r][o] + sum[r][o];
        }
    }
#pragma unroll
    for (u32 r = 0; r < 4; r++) {
#pragma unroll
        for (u32 o = 0; o < 4; o++) {
            const u32 output = blockIdx.x * SPAN + left + o;
            if (row + top + r < of.rows() && output < of.outputs) of.put(row + top + r, output, total[r][o]);
        }
    }
}

#define LINEAR(S, name)                                                                                          \
    KERNEL __launch_bounds__(LINEAR_THREADS) linear_one_row_##name(PRODUCTS_ARGUMENTS) {                         \
        few_rows<S, 1>(PRODUCTS);                                                                                \
    }                                                                                                            \
    KERNEL __launch_bounds__(LINEAR_THREADS) linear_few_rows_##name(PRODUCTS_ARGUMENTS) {                        \
        few_rows<S, 4>(PRODUCTS);                                                                                \
    }                                                                                                            \
    KERNEL __launch_bounds__(LINEAR_THREADS) linear_many_rows_##name(PRODUCTS_ARGUMENTS) { many_rows<S>(PRODUCTS); }

LINEAR(Plain<F32>, f32)
LINEAR(Plain<Bf16>, bf16)
LINEAR(Plain<F16>, f16)
LINEAR(Mxfp4, mxfp4)
LINEAR(E4m3, e4m3)
