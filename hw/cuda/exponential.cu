// The exponential by itself, for the self-test (rule 11): what the other kernels compute with it shows few of its inputs.
#include "contract.cuh"

// Inputs that have a hash together.
constexpr u32 EXP_CHUNK = 1 << 12;

KERNEL exponentials(float* values, u32 n) {
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < n; at += gridDim.x * blockDim.x) values[at] = exponential(values[at]);
}

// FNV-1a over the results of each of `count` chunks of inputs that are neighbours as bits: `every`-th chunks, from the one that would
// be `first`. A thread has a chunk, so that no order but that of a loop is in it.
KERNEL exponential_hashes(u64* hashes, u32 first, u32 every, u32 count) {
    const u32 chunk = blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk >= count) return;
    const u32 input = (first + chunk) * every * EXP_CHUNK;
    u64 hash = 0xcbf29ce484222325ull;
    for (u32 i = 0; i < EXP_CHUNK; i++) {
        hash = (hash ^ __float_as_uint(exponential(__uint_as_float(input + i)))) * 0x100000001b3ull;
    }
    hashes[chunk] = hash;
}
