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

// Half an entry, and which outputs of the tile it is: the first of four and of four more.
template <class T>
struct HalfEntry {
    static constexpr u32 BYTES = TILE * T::BYTES;
    static __device__ __forceinline__ void load(const byte* entry, u32 half, float* out) {
        if (T::BYTES == 4) {
            T::eight(entry + half * 32, out);
        } else {
            // A word holds an output and the one eight further.
            float mixed[8];
            T::eight(entry + half * 16, mixed);
#pragma unroll
            for (u32 i = 0; i < 4; i++) out[i] = mixed[2 * i], out[4 + i] = mixed[2 * i + 1];
        }
    }
    static __device__ __forceinline__ u32 low(u32 half) { return T::BYTES == 4 ? half * 8 : half * 4; }
    static __device__ __forceinline__ u32 high(u32 half) { return T::BYTES == 4 ? half * 8 + 4 : half * 4 + 8; }
};

// Few rows: a block has a tile of outputs (x) and `ROWS` rows (y), a warp a chunk, a thread a lane of eight outputs.
template <class T, u32 ROWS>
__device__ __forceinline__ void few_rows(const Products& of) {
    typedef HalfEntry<T> Half;
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
            const byte* const entries = of.entries(Half::BYTES, tile, chunk, lane);
            float acc[ROWS][8] = {};
#pragma unroll 2
            for (u32 step = 0; step < steps; step += 4) {
                float x[ROWS][4];
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    const float4 four = load_float4(of.lane(smaller(row + r, rows - 1), chunk, lane) + step);
                    x[r][0] = four.x, x[r][1] = four.y, x[r][2] = four.z, x[r][3] = four.w;
                }
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    if (step + i >= steps) break;
                    float w[8];
                    Half::load(entries + (step + i) * Half::BYTES, half, w);
#pragma unroll
                    for (u32 r = 0; r < ROWS; r++) {
#pragma unroll
                        for (u32 o = 0; o < 8; o++) acc[r][o] = fused(x[r][i], w[o], acc[r][o]);
                    }
                }
            }
            float* const fold = folds + warp * LANES * (TILE + 1);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                if (r > 0) __syncwarp();
#pragma unroll
                for (u32 o = 0; o < 4; o++) {
                    fold[lane * (TILE + 1) + Half::low(half) + o] = acc[r][o];
                    fold[lane * (TILE + 1) + Half::high(half) + o] = acc[r][4 + o];
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
template <class T>
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
            const byte* const entries = of.entries(HalfEntry<T>::BYTES, tile, chunk, lane);
            HalfEntry<T>::load(entries + step_of_half(i) * HalfEntry<T>::BYTES, i % 2, w[n]);
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
            const u32 low = HalfEntry<T>::low(i % 2), high = HalfEntry<T>::high(i % 2);
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

template <class T>
__device__ __forceinline__ void many_rows(const Products& of) {
    SHARED(float, ws, STEPS* STRIDE);
    SHARED(float, xs, STEPS* STRIDE);
    const u32 row = blockIdx.y * SPAN, left = threadIdx.x % 16 * 4, top = threadIdx.x / 16 * 4;
    if (row >= of.rows()) return;
    float sum[4][4] = {}, total[4][4] = {};
    Staged<T> staged;
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

#define LINEAR(name, form) \
    KERNEL __launch_bounds__(LINEAR_THREADS) name(PRODUCTS_ARGUMENTS) { form(PRODUCTS); }

LINEAR(linear_one_row_f32, (few_rows<F32, 1>))
LINEAR(linear_one_row_bf16, (few_rows<Bf16, 1>))
LINEAR(linear_one_row_f16, (few_rows<F16, 1>))
LINEAR(linear_few_rows_f32, (few_rows<F32, 4>))
LINEAR(linear_few_rows_bf16, (few_rows<Bf16, 4>))
LINEAR(linear_few_rows_f16, (few_rows<F16, 4>))
LINEAR(linear_many_rows_f32, many_rows<F32>)
LINEAR(linear_many_rows_bf16, many_rows<Bf16>)
LINEAR(linear_many_rows_f16, many_rows<F16>)
