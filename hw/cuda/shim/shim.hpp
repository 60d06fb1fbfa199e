// CUDA's words for the C++ compiler: the same kernel sources run on a CPU, each thread of a block a fiber (shim.cpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the thread that runs; set at each switch of fibers.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
static inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, 8);
    return bits;
}
static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __dp4a(int a, int b, int sum) {
    const auto product = [=](int bits) { return static_cast<std::int8_t>(a >> bits) * static_cast<std::int8_t>(b >> bits); };
    return sum + product(0) + product(8) + product(16) + product(24);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

namespace shim {

// Where in the sources threads wait for each other.
struct Site {
    const char* file;
    int line;
};

void* shared_bytes(std::size_t bytes, const char* name);
void sync_threads(Site site);
void sync_warp(unsigned mask, Site site);
std::uint64_t exchange(unsigned mask, std::uint64_t bits, unsigned source, Site site);
void copy_async(void* to, const void* from, std::size_t bytes);
void wait_for_copies(Site site);

template <class T>
T* shared(std::size_t count, const char* name) {
    return static_cast<T*>(shared_bytes(count * sizeof(T), name));
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(mask, bits, source, site);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// A bit for each lane of a warp.
inline unsigned ballot(unsigned mask, bool bit, Site site) {
    unsigned bits = bit ? 1u << threadIdx.x % 32 : 0u;
    for (unsigned lanes = 16; lanes > 0; lanes /= 2) bits |= shuffle(mask, bits, (threadIdx.x ^ lanes) % 32, site);
    return bits;
}

// An argument of a launch: a value's bits, or the address of a buffer.
struct Argument {
    bool is_buffer;
    std::uint64_t bits;
};

// What a kernel takes: how many bytes, and whether they are an address, of what it only reads.
struct Parameter {
    std::size_t bytes;
    bool is_pointer, is_const;
};

// A kernel, as it is launched by name.
struct Kernel {
    const char* name;
    std::size_t arguments;
    const Parameter* parameters;
    void (*call)(const Argument* arguments);
};

extern const Kernel kernels[];
extern const std::size_t kernels_count;

}  // namespace shim

#define SHIM_SITE (shim::Site{__FILE__, __LINE__})
#define __syncthreads() shim::sync_threads(SHIM_SITE)
#define __syncwarp() shim::sync_warp(0xffffffffu, SHIM_SITE)
#define __shfl_sync(mask, value, lane) shim::shuffle(mask, value, (lane) % 32, SHIM_SITE)
#define __ballot_sync(mask, bit) shim::ballot(mask, bit, SHIM_SITE)
#define __shfl_xor_sync(mask, value, lanes) shim::shuffle(mask, value, (threadIdx.x ^ (lanes)) % 32, SHIM_SITE)
