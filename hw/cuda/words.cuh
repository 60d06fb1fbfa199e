// The words that kernels are written in, for a GPU and for the shim alike.
//
// Kernels use C++17, the vector types and intrinsics of CUDA, and what stands here. Absent on purpose: atomics of any kind,
// textures, headers of a toolkit; and tensor cores, but for integers, whose sums are exact.
#pragma once

#ifdef LITE_LLM_SHIM
#include "shim/shim.hpp"
#define KERNEL extern "C" void
// Memory of a block. Every thread asks for the same pieces in the same order.
#define SHARED(type, name, count) type* const name = shim::shared<type>(count, #name)
#else
#define KERNEL extern "C" __global__ void
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

typedef unsigned char byte;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 WARP = 32;
constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

__device__ __forceinline__ u32 pieces(u32 of, u32 size) { return (of + size - 1) / size; }

// Sixteen bytes at an address that is a multiple of sixteen.
__device__ __forceinline__ uint4 load16(const void* at) { return *reinterpret_cast<const uint4*>(at); }

__device__ __forceinline__ float4 load_float4(const float* at) { return *reinterpret_cast<const float4*>(at); }

// Copies so many bytes (4, 8 or 16, at such multiples) to shared memory, some time before this thread's next `wait_for_copies` ends.
// Until then nobody may touch either place; after it the bytes are this thread's, and after a barrier everybody's.
#ifdef LITE_LLM_SHIM
template <u32 BYTES>
inline void copy_async(void* to, const void* from) {
    shim::copy_async(to, from, BYTES);
}
#define wait_for_copies() shim::wait_for_copies(SHIM_SITE)
#elif __CUDA_ARCH__ >= 800
template <u32 BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
    if (BYTES == 16) {
        // Past the first cache: other blocks want it, not this one.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES));
    }
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
// Devices that have no such copies.
template <u32 BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#pragma unroll
    for (u32 i = 0; i < BYTES / 4; i++) static_cast<u32*>(to)[i] = static_cast<const u32*>(from)[i];
}
__device__ __forceinline__ void wait_for_copies() {}
#endif
