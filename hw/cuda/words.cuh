// The words that kernels are written in, for a GPU and for the shim alike.
//
// Kernels use C++17, the vector types and intrinsics of CUDA, and what stands here. Absent on purpose: atomics of any kind,
// textures, tensor cores, headers of a toolkit.
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
