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
// Where such a half has its codes, and the factors of its first four outputs and of the others, if a storage has any.
struct Half {
    const byte *codes, *lows, *highs;
};

template <class T>
struct Plain {
    static constexpr u32 ENTRY = TILE * T::BYTES;
    static __device__ __forceinline__ u32 factor_bytes(u32) { return 0; }
    static __device__ __forceinline__ u32 low(u32 half) { return T::BYTES == 4 ? half * 8 : half * 4; }
    static __device__ __forceinline__ u32 high(u32 half) { return T::BYTES == 4 ? half * 8 + 4 : half * 4 + 8; }
    static __device__ __forceinline__ Half half_of(const byte* chunk, u32 steps, u32 lane, u32 step, u32 half) {
        return {chunk + (lane * steps + step) * ENTRY + half * (ENTRY / 2), nullptr, nullptr};
    }
    static __device__ __forceinline__ void widen(const Half& half, float* out) {
        if (T::BYTES == 4) {
            T::eight(half.codes, out);
        } else {
            // A word holds an output and the one eight further.
            float mixed[8];
            T::eight(half.codes, mixed);
#pragma unroll
            for (u32 i = 0; i < 4; i++) out[i] = mixed[2 * i], out[4 + i] = mixed[2 * i + 1];
        }
    }

    // What is kept of a half until it is widened.
    static constexpr u32 KEPT = ENTRY / 2;
    static __device__ __forceinline__ void keep(byte* to, const Half& half) {
#pragma unroll
        for (u32 at = 0; at < KEPT; at += 16) copy_async<16>(to + at, half.codes + at);
    }
    static __device__ __forceinline__ Half kept(const byte* at) { return {at, nullptr, nullptr}; }
};

// Four bits a weight, and for each 32 inputs and each output half of the power of two that they are multiplied with.
struct Mxfp4 {
    static constexpr u32 ENTRY = TILE / 2, BLOCK = 32;
    static __device__ __forceinline__ u32 factor_bytes(u32 entries) { return pieces(entries, BLOCK) * TILE * 2; }
    static __device__ __forceinline__ u32 low(u32 half) { return half * 4; }
    static __device__ __forceinline__ u32 high(u32 half) { return half * 4 + 8; }
    static __device__ __forceinline__ Half half_of(const byte* chunk, u32 steps, u32 lane, u32 step, u32 half) {
        const byte* const factors = chunk + (step * LANES + lane) / BLOCK * TILE * 2 + half * 8;
        return {chunk + factor_bytes(steps * LANES) + (lane * steps + step) * ENTRY + half * 4, factors, factors + 16};
    }
    // Twice the value of four bits, exactly: one of sign, two of exponent, one of fraction.
    static __device__ __forceinline__ float doubled(u32 code) {
        const float magnitude = __uint_as_float((code & 7u) << 22) * power_of_two(127);
        return __uint_as_float(__float_as_uint(magnitude) | (code & 8u) << 28);
    }
    static __device__ __forceinline__ void widen(const Half& half, float* out) {
        const u32 codes = *reinterpret_cast<const u32*>(half.codes);
        const uint2 lows = *reinterpret_cast<const uint2*>(half.lows), highs = *reinterpret_cast<const uint2*>(half.highs);
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

    static constexpr u32 KEPT = 24;
    static __device__ __forceinline__ void keep(byte* to, const Half& half) {
        copy_async<4>(to, half.codes);
        copy_async<8>(to + 8, half.lows);
        copy_async<8>(to + 16, half.highs);
    }
    static __device__ __forceinline__ Half kept(const byte* at) { return {at, at + 8, at + 16}; }
};

// A byte a weight, and a factor for each 128 inputs: the published one times 256. A code that is no number has such a factor.
struct E4m3 {
    static constexpr u32 ENTRY = TILE, BLOCK = 128;
    static __device__ __forceinline__ u32 factor_bytes(u32 entries) { return pieces(entries, BLOCK) * 4; }
    static __device__ __forceinline__ u32 low(u32 half) { return half * 8; }
    static __device__ __forceinline__ u32 high(u32 half) { return half * 8 + 4; }
    static __device__ __forceinline__ Half half_of(const byte* chunk, u32 steps, u32 lane, u32 step, u32 half) {
        const byte* const factor = chunk + (step * LANES + lane) / BLOCK * 4;
        return {chunk + factor_bytes(steps * LANES) + (lane * steps + step) * ENTRY + half * 8, factor, factor};
    }
    // The value of a byte by 256, exactly: one of sign, four of exponent, three of fraction.
    static __device__ __forceinline__ float by_256(u32 code) {
        const float magnitude = __uint_as_float((code & 0x7fu) << 20) * power_of_two(112);
        return __uint_as_float(__float_as_uint(magnitude) | (code & 0x80u) << 24);
    }
    static __device__ __forceinline__ void widen(const Half& half, float* out) {
        // Factors are words, so that entries begin at multiples of four bytes only.
        const u32* const codes = reinterpret_cast<const u32*>(half.codes);
        const float factor = *reinterpret_cast<const float*>(half.lows);
        const u32 first = codes[0], second = codes[1];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            out[i] = by_256(first >> (8 * i)) * factor;
            out[4 + i] = by_256(second >> (8 * i)) * factor;
        }
    }

    static constexpr u32 KEPT = 12;
    static __device__ __forceinline__ void keep(byte* to, const Half& half) {
        copy_async<4>(to, half.codes);
        copy_async<4>(to + 4, half.codes + 4);
        copy_async<4>(to + 8, half.lows);
    }
    static __device__ __forceinline__ Half kept(const byte* at) { return {at, at + 8, at + 8}; }
};

template <class S>
__device__ __forceinline__ void load(const byte* chunk, u32 steps, u32 lane, u32 step, u32 half, float* out) {
    S::widen(S::half_of(chunk, steps, lane, step, half), out);
}

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
                for (u32 i = 0; i < 4; i++) load<S>(weights, steps, lane, step + i, half, w[i]);
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
                load<S>(weights, steps, lane, step, half, w);
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

// Many rows: a block has 128 outputs (x) and 8 * `ROWS` rows (y), a thread eight by `ROWS` of them. Pieces of a lane, of sixteen steps,
// come to shared memory one after another: while one is added up, the next is widened, and the one after it is on its way.
constexpr u32 MANY_THREADS = 128;
constexpr u32 ACROSS = 128;
constexpr u32 PIECE = 16;
// Distances in shared memory between rows, and between tiles: multiples of four words, so that four are read at once, and such that
// what a warp reads together is in different banks.
constexpr u32 ROW_STRIDE = PIECE + 4;
constexpr u32 TILE_STRIDE = PIECE * TILE + TILE;
constexpr u32 OUTPUTS_PIECE = ACROSS / TILE * TILE_STRIDE;
// Halves of entries of a piece, for each thread.
constexpr u32 HALVES = 2 * ACROSS / TILE * PIECE / MANY_THREADS;

// A piece of a lane.
struct Piece {
    u32 chunk, lane, step, steps;

    __device__ __forceinline__ void next(const Products& of) {
        step += PIECE;
        if (step < steps) return;
        step = 0;
        if (++lane < LANES) return;
        lane = 0;
        if (++chunk < of.chunks()) steps = of.steps(chunk);
    }
};

// Where a block has what in shared memory, and the part of a thread in bringing it there. Weights of 32 bits come where they are
// used, others are kept by the thread that widens them.
template <class S, u32 ROWS>
struct Brought {
    static constexpr bool WIDE = S::ENTRY == TILE * 4;
    static constexpr u32 ROWS_PIECE = 8 * ROWS * ROW_STRIDE;
    static constexpr u32 FOURS = (8 * ROWS * PIECE / 4 + MANY_THREADS - 1) / MANY_THREADS;
    float *xs, *ws;
    byte* kept;
    const float* x_from[FOURS];
    const byte* w_from[HALVES];

    static __device__ __forceinline__ u32 four(u32 n) { return threadIdx.x + n * MANY_THREADS; }
    static __device__ __forceinline__ u32 step_of(u32) { return threadIdx.x / 2 % PIECE; }
    static __device__ __forceinline__ u32 tile_of(u32 n) { return (threadIdx.x + n * MANY_THREADS) / (2 * PIECE); }
    static __device__ __forceinline__ byte* kept_at(byte* kept, u32 slot, u32 n) {
        return kept + ((slot * HALVES + n) * MANY_THREADS + threadIdx.x) * S::KEPT;
    }
    __device__ __forceinline__ float* w_at(u32 slot, u32 n) const {
        return ws + slot * OUTPUTS_PIECE + tile_of(n) * TILE_STRIDE + step_of(n) * TILE;
    }

    __device__ __forceinline__ Brought(const Products& of, u32 row, float* xs, float* ws, byte* kept) : xs(xs), ws(ws), kept(kept) {
        // What is not there is what is there last: nobody uses what comes of it.
#pragma unroll
        for (u32 n = 0; n < FOURS; n++) {
            x_from[n] = of.lane(smaller(row + four(n) / (PIECE / 4), of.rows() - 1), 0, 0) + four(n) % (PIECE / 4) * 4;
        }
#pragma unroll
        for (u32 n = 0; n < HALVES; n++) {
            const u32 tile = blockIdx.x * (ACROSS / TILE) + tile_of(n);
            w_from[n] = of.chunk_of<S>(smaller(tile, pieces(of.outputs, TILE) - 1), 0);
        }
    }

    // `third` and `second` say which of three and of two places.
    __device__ __forceinline__ void fetch(const Piece& piece, u32 third, u32 second) {
#pragma unroll
        for (u32 n = 0; n < FOURS; n++) {
            if (8 * ROWS * PIECE / 4 % MANY_THREADS != 0 && four(n) >= 8 * ROWS * PIECE / 4) continue;
            float* const to = xs + third * ROWS_PIECE + four(n) / (PIECE / 4) * ROW_STRIDE + four(n) % (PIECE / 4) * 4;
            copy_async<16>(to, x_from[n] + piece.chunk * CHUNK + piece.lane * STEPS + piece.step);
        }
#pragma unroll
        for (u32 n = 0; n < HALVES; n++) {
            const byte* const chunk = w_from[n] + u64(piece.chunk) * Products::whole<S>();
            const u32 step = smaller(piece.step + step_of(n), piece.steps - 1), half = threadIdx.x % 2;
            const Half from = S::half_of(chunk, piece.steps, piece.lane, step, half);
            byte* const wide = reinterpret_cast<byte*>(w_at(third, n) + S::low(half));
            S::keep(WIDE ? wide : kept_at(kept, second, n), from);
        }
    }

    __device__ __forceinline__ void widen(u32 second) {
#pragma unroll
        for (u32 n = 0; !WIDE && n < HALVES; n++) {
            float w[8];
            S::widen(S::kept(kept_at(kept, second, n)), w);
            float* const to = w_at(second, n);
            *reinterpret_cast<float4*>(to + S::low(threadIdx.x % 2)) = make_float4(w[0], w[1], w[2], w[3]);
            *reinterpret_cast<float4*>(to + S::high(threadIdx.x % 2)) = make_float4(w[4], w[5], w[6], w[7]);
        }
    }
};

template <u32 ROWS>
__device__ __forceinline__ void add_row_step(const float* x, const float4& a, const float4& b, float (&acc)[ROWS][8]) {
    const float w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) add_step(x[r], w, acc[r]);
}

template <u32 ROWS>
__device__ __forceinline__ void add_four_steps(const float* x, const float* w, float (&acc)[ROWS][8]) {
    float fours[4][ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        const float4 four = load_float4(x + r * 8 * ROW_STRIDE);
        fours[0][r] = four.x, fours[1][r] = four.y, fours[2][r] = four.z, fours[3][r] = four.w;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        add_row_step<ROWS>(fours[i], load_float4(w + i * TILE), load_float4(w + i * TILE + 2 * TILE_STRIDE), acc);
    }
}

// Adds so many steps of a piece up, of rows that are eight apart, and outputs of a tile and of the second after it.
template <u32 ROWS>
__device__ __forceinline__ void add_piece(const float* x, const float* w, u32 count, float (&acc)[ROWS][8]) {
    if (count == PIECE) {
#pragma unroll
        for (u32 step = 0; step < PIECE; step += 4) add_four_steps<ROWS>(x + step, w + step * TILE, acc);
        return;
    }
    u32 step = 0;
#pragma unroll 1
    for (; step + 4 <= count; step += 4) add_four_steps<ROWS>(x + step, w + step * TILE, acc);
#pragma unroll 1
    for (; step < count; step++) {
        float one[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) one[r] = x[r * 8 * ROW_STRIDE + step];
        const float* const at = w + step * TILE;
        add_row_step<ROWS>(one, load_float4(at), load_float4(at + 2 * TILE_STRIDE), acc);
    }
}

// Does something with each sum of a thread that has a place among the results.
template <u32 ROWS, class Work>
__device__ __forceinline__ void for_each_of(const Products& of, u32 row, u32 left, float (&sum)[ROWS][8], Work work) {
    const u32 rows = of.rows();
    float* const from = of.out + (u64(of.first()) + row) * of.outputs + left;
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        float* const at = from + u64(8 * r) * of.outputs;
#pragma unroll
        for (u32 o = 0; o < 8; o++) {
            const u32 right = o < 4 ? o : o - 4 + ACROSS / 4;
            if (row + 8 * r < rows && left + right < of.outputs) work(sum[r][o], at[right], left + right);
        }
    }
}

// Adds a chunk to those before it. Their running total stands where the result will: there are no registers for it, and it is needed
// once in a chunk.
template <u32 ROWS>
__device__ __forceinline__ void put_chunk(const Products& of, u32 row, u32 left, u32 chunk, float (&sum)[ROWS][8]) {
    if (chunk > 0) {
        for_each_of<ROWS>(of, row, left, sum, [](float& value, const float& before, u32) { value = before + value; });
    }
    if (chunk + 1 == of.chunks() && of.biases != nullptr) {
        for_each_of<ROWS>(of, row, left, sum, [&](float& value, const float&, u32 output) { value = of.biased(value, output); });
    }
    for_each_of<ROWS>(of, row, left, sum, [](const float& value, float& to, u32) { to = value; });
}

template <class S, u32 ROWS>
__device__ __forceinline__ void rows_of_block(const Products& of, u32 row, float* xs, float* ws, byte* kept) {
    // A warp has a fourth of a block: half of its outputs, and four of each eight rows.
    const u32 warp = threadIdx.x / WARP, place = threadIdx.x % WARP;
    const u32 left = warp % 2 * (ACROSS / 2) + place % 8 * 4, top = warp / 2 * 4 + place / 8;
    using Parts = Brought<S, ROWS>;
    Parts parts(of, row, xs, ws, kept);
    Piece ahead = {0, 0, 0, of.steps(0)};
    parts.fetch(ahead, 0, 0);
    ahead.next(of);
    wait_for_copies();
    // What this thread has brought: it needs no barrier.
    parts.widen(0);
    bool follows = ahead.chunk < of.chunks();
    if (follows) parts.fetch(ahead, 1, 1);
    ahead.next(of);
    u32 third = 0, second = 0;
#pragma unroll 1
    for (u32 chunk = 0; chunk < of.chunks(); chunk++) {
        float sum[ROWS][8];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
#pragma unroll
            // Added to -0, the first lane stays what it is.
            for (u32 o = 0; o < 8; o++) sum[r][o] = -0.0f;
        }
        const u32 steps = of.steps(chunk);
#pragma unroll 1
        for (u32 lane = 0; lane < LANES; lane++) {
            float acc[ROWS][8] = {};
#pragma unroll 1
            for (u32 step = 0; step < steps; step += PIECE) {
                wait_for_copies();
                __syncthreads();
                // The piece after the next goes where the one before was.
                const bool is_next = follows;
                follows = ahead.chunk < of.chunks();
                if (follows) parts.fetch(ahead, third == 0 ? 2 : third - 1, second);
                ahead.next(of);
                if (is_next) parts.widen(second ^ 1);
                const float* const x = xs + third * Parts::ROWS_PIECE + top * ROW_STRIDE;
                const float* const w = ws + (Parts::WIDE ? third : second) * OUTPUTS_PIECE + left / TILE * TILE_STRIDE + left % TILE;
                add_piece<ROWS>(x, w, smaller(PIECE, steps - step), acc);
                third = third == 2 ? 0 : third + 1;
                second ^= 1;
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
#pragma unroll
                for (u32 o = 0; o < 8; o++) sum[r][o] += acc[r][o];
            }
        }
        put_chunk<ROWS>(of, row + top, blockIdx.x * ACROSS + left, chunk, sum);
    }
}

// Of no inputs.
template <u32 ROWS>
__device__ __forceinline__ void put_zeros(const Products& of, u32 row) {
    for (u32 i = threadIdx.x; i < 8 * ROWS * ACROSS; i += MANY_THREADS) {
        const u32 r = row + i / ACROSS, output = blockIdx.x * ACROSS + i % ACROSS;
        if (r < of.rows() && output < of.outputs) of.put(r, output, 0.0f);
    }
}

// Blocks of up to 8 * `ROWS` rows; where half of them or less are left, of as many.
template <class S, u32 ROWS>
__device__ __forceinline__ void many_rows(const Products& of) {
    using Parts = Brought<S, ROWS>;
    SHARED(float, xs, 3 * Parts::ROWS_PIECE);
    SHARED(float, ws, (Parts::WIDE ? 3 : 2) * OUTPUTS_PIECE);
    SHARED(byte, kept, Parts::WIDE ? 16 : 2 * HALVES * MANY_THREADS * S::KEPT);
    const u32 row = blockIdx.y * 8 * ROWS;
    if (row >= of.rows()) return;
    if (of.chunks() == 0) {
        put_zeros<ROWS>(of, row);
    } else if (of.rows() - row <= 4 * ROWS) {
        rows_of_block<S, ROWS / 2>(of, row, xs, ws, kept);
    } else {
        rows_of_block<S, ROWS>(of, row, xs, ws, kept);
    }
}

#define LINEAR(S, name)                                                                                          \
    KERNEL __launch_bounds__(LINEAR_THREADS) linear_one_row_##name(PRODUCTS_ARGUMENTS) {                         \
        few_rows<S, 1>(PRODUCTS);                                                                                \
    }                                                                                                            \
    KERNEL __launch_bounds__(LINEAR_THREADS) linear_few_rows_##name(PRODUCTS_ARGUMENTS) {                        \
        few_rows<S, 4>(PRODUCTS);                                                                                \
    }                                                                                                            \
    KERNEL __launch_bounds__(MANY_THREADS, 3) linear_some_rows_##name(PRODUCTS_ARGUMENTS) {                      \
        many_rows<S, 4>(PRODUCTS);                                                                               \
    }                                                                                                            \
    KERNEL __launch_bounds__(MANY_THREADS, 2) linear_many_rows_##name(PRODUCTS_ARGUMENTS) {                      \
        many_rows<S, 8>(PRODUCTS);                                                                               \
    }

LINEAR(Plain<F32>, f32)
LINEAR(Plain<Bf16>, bf16)
LINEAR(Plain<F16>, f16)
LINEAR(Mxfp4, mxfp4)
LINEAR(E4m3, e4m3)
