// Several matrix products in one grid, a product for each z: an expert with its rows, or a matrix with all of them.
#pragma once
#include "contract.cuh"

constexpr u32 LINEAR_THREADS = 256;
constexpr u32 LINEAR_WARPS = LINEAR_THREADS / WARP;

// Rows and outputs that a block of a prefill has, and the distance between steps in shared memory: a multiple of four words,
// so that four are read at once, and not of eight, so that neighbours are in other banks.
constexpr u32 SPAN = 64;
constexpr u32 STRIDE = SPAN + 4;

// For each product, where its weights (and biases, if any) begin and which rows of x and of the results it has.
struct Products {
    // The inputs, as the kernels want them; of integers their scales.
    const float* x;
    const byte* weights;
    const u64* weights_at;
    const byte* biases;
    const u64* biases_at;
    const u32* first_row;
    float* out;
    u32 inputs;
    u32 outputs;

    __device__ __forceinline__ u32 padded() const { return pieces(inputs, LANES) * LANES; }
    __device__ __forceinline__ u32 chunks() const { return pieces(inputs, CHUNK); }
    __device__ __forceinline__ u32 first() const { return first_row[blockIdx.z]; }
    __device__ __forceinline__ u32 rows() const { return first_row[blockIdx.z + 1] - first_row[blockIdx.z]; }
    // Steps of each lane of a chunk.
    __device__ __forceinline__ u32 steps(u32 chunk) const { return smaller(STEPS, (padded() - chunk * CHUNK) / LANES); }
    __device__ __forceinline__ const float* lane(u32 row, u32 chunk, u32 lane) const {
        return x + ((u64(first()) + row) * chunks() + chunk) * CHUNK + lane * STEPS;
    }
    // A whole chunk of a tile: factors if a storage has them, then the entries of lane after lane.
    template <class S>
    static __device__ __forceinline__ u64 whole() {
        return S::factor_bytes(CHUNK) + CHUNK * S::ENTRY;
    }
    template <class S>
    __device__ __forceinline__ const byte* chunk_of(u32 tile, u32 chunk) const {
        const u64 rest = padded() % CHUNK;
        const u64 tile_bytes = padded() / CHUNK * whole<S>() + S::factor_bytes(u32(rest)) + rest * S::ENTRY;
        return weights + weights_at[blockIdx.z] + tile * tile_bytes + chunk * whole<S>();
    }
    __device__ __forceinline__ float biased(float value, u32 output) const {
        if (biases == nullptr) return value;
        return value + reinterpret_cast<const float*>(biases + biases_at[blockIdx.z])[output];
    }
    __device__ __forceinline__ void put(u32 row, u32 output, float value) const {
        out[(u64(first()) + row) * outputs + output] = biased(value, output);
    }
};

#define PRODUCTS_ARGUMENTS                                                                                              \
    const float *__restrict__ x, const byte *__restrict__ weights, const u64 *__restrict__ weights_at,                   \
        const byte *__restrict__ biases, const u64 *__restrict__ biases_at, const u32 *__restrict__ first_row,           \
        float *__restrict__ out, u32 inputs, u32 outputs
#define PRODUCTS Products{x, weights, weights_at, biases, biases_at, first_row, out, inputs, outputs}
