// The arithmetic of the numeric contract (docs/numerics.md): what the modules convert, math and linear of the CPU's kernels say,
// operation by operation. To be compiled without contraction, without flushing, with exact division and square root.
#pragma once
#include "words.cuh"

constexpr u32 LANES = 16;
constexpr u32 CHUNK = 1024;
// Steps of a lane in a whole chunk.
constexpr u32 STEPS = CHUNK / LANES;
constexpr u32 TILE = 16;
constexpr u32 PAGE = 64;

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u; }

__device__ __forceinline__ bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float power_of_two(u32 exponent) { return __uint_as_float((exponent + 127u) << 23); }

// Rule 4.
__device__ __forceinline__ float exponential(float x) {
    const float round = 12582912.0f;
    const float low = x < -104.0f ? -104.0f : x;
    const float clamped = low > 89.0f ? 89.0f : low;
    const float shifted = fused(clamped, 1.44269504088896340736f, round);
    const float n = shifted - round;
    const float r = fused(n, 2.1219444e-4f, fused(n, -0.6933594f, clamped));
    float p = 1.9875691e-4f;
    p = fused(p, r, 1.3981999e-3f);
    p = fused(p, r, 8.333452e-3f);
    p = fused(p, r, 4.1665796e-2f);
    p = fused(p, r, 1.6666665e-1f);
    p = fused(p, r, 0.5f);
    p = fused(p, r * r, r) + 1.0f;
    const u32 exponent = __float_as_uint(shifted) - __float_as_uint(round);
    // Half of it, rounded down: a shift that keeps the sign.
    const u32 first = (exponent >> 1) | (exponent & 0x80000000u);
    const float scaled = p * power_of_two(first) * power_of_two(exponent - first);
    return is_nan(x) ? __uint_as_float(0x7fc00000u) : scaled;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

__device__ __forceinline__ float silu(float x) { return x / (1.0f + exponential(-x)); }

// Rule 9. Storage types: how many bytes a value takes, and eight neighbours at an address that is a multiple of sixteen.
struct F32 {
    static constexpr u32 BYTES = 4;
    static __device__ __forceinline__ float value(const byte* at) { return *reinterpret_cast<const float*>(at); }
    static __device__ __forceinline__ void put(byte* at, float value) { *reinterpret_cast<float*>(at) = value; }
    static __device__ __forceinline__ void eight(const byte* at, float* out) {
        const float4 a = load_float4(reinterpret_cast<const float*>(at));
        const float4 b = load_float4(reinterpret_cast<const float*>(at) + 4);
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
        out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    }
};

// What two types of sixteen bits share; `Half` says what bits mean.
template <class Half>
struct Sixteen {
    static constexpr u32 BYTES = 2;
    static __device__ __forceinline__ float value(const byte* at) {
        return Half::widened(*reinterpret_cast<const u16*>(at));
    }
    static __device__ __forceinline__ void put(byte* at, float value) {
        *reinterpret_cast<u16*>(at) = static_cast<u16>(Half::narrowed(value));
    }
    static __device__ __forceinline__ void eight(const byte* at, float* out) {
        const uint4 words = load16(at);
        pair(words.x, out[0], out[1]);
        pair(words.y, out[2], out[3]);
        pair(words.z, out[4], out[5]);
        pair(words.w, out[6], out[7]);
    }
    static __device__ __forceinline__ void pair(u32 word, float& low, float& high) {
        low = Half::widened(word & 0xffffu);
        high = Half::widened(word >> 16);
    }
};

struct Bf16 : Sixteen<Bf16> {
    static __device__ __forceinline__ float widened(u32 bits) { return __uint_as_float(bits << 16); }
    static __device__ __forceinline__ u32 narrowed(float value) {
        const u32 bits = __float_as_uint(value);
        const u32 rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
        return is_nan(value) ? (bits >> 16) | 0x40u : rounded;
    }
};

struct F16 : Sixteen<F16> {
    // A product with a power of two is exact, subnormals included, and needs no header of a toolkit.
    static __device__ __forceinline__ float widened(u32 bits) {
        const float magnitude = __uint_as_float((bits & 0x7fffu) << 13) * power_of_two(112);
        const u32 special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
        return __uint_as_float(__float_as_uint(magnitude) | special | (bits & 0x8000u) << 16);
    }
    static __device__ __forceinline__ u32 narrowed(float value) {
        const u32 bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
        if (magnitude > 0x7f800000u) return sign | 0x7e00u | (magnitude >> 13 & 0x3ffu);
        if (magnitude >= 0x47800000u) return sign | 0x7c00u;
        if (magnitude >= 0x38800000u) {
            // Normal: a fraction that rounds up to the next power carries into the exponent, and from the last into infinity.
            const u32 rebased = magnitude - 0x38000000u;
            return sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;
        }
        if (magnitude < 0x33000000u) return sign;
        const u32 shift = 126u - (magnitude >> 23);
        const u32 fraction = (magnitude & 0x7fffffu) | 0x800000u;
        const u32 half = (1u << (shift - 1)) - 1u;
        return sign | (fraction + half + (fraction >> shift & 1u)) >> shift;
    }
};

// Adds the lanes of each half of a warp left to right; both halves have their sum in all lanes. By whole warps.
__device__ __forceinline__ float fold_lanes(float lane) {
    const u32 first = threadIdx.x & 16u;
    float sum = __shfl_sync(ALL, lane, first);
#pragma unroll
    for (u32 i = 1; i < LANES; i++) sum += __shfl_sync(ALL, lane, first + i);
    return sum;
}

// Rule 2 for one row of a block: half a warp has a chunk, a thread a lane. All threads get the result, +0 for no pair. `x(k)` and
// `w(k)` are the operands. `sums` has a place for each half of a warp of the block; it may be used again at once.
template <class X, class W>
__device__ __forceinline__ float block_dot(u32 n, float* sums, X x, W w) {
    const u32 lane = threadIdx.x % LANES, half = threadIdx.x / LANES, halves = blockDim.x / LANES;
    const u32 chunks = pieces(n, CHUNK);
    float total = 0.0f;
    for (u32 first = 0; first < chunks; first += halves) {
        const u32 chunk = first + half;
        float acc = 0.0f;
        if (chunk < chunks) {
            const u32 end = smaller(n, (chunk + 1) * CHUNK);
#pragma unroll 8
            for (u32 k = chunk * CHUNK + lane; k < end; k += LANES) acc = fused(x(k), w(k), acc);
            // The padding is part of the definition: it makes -0 to +0.
            if (end % LANES != 0 && lane >= end % LANES) acc = fused(0.0f, 0.0f, acc);
        }
        acc = fold_lanes(acc);
        if (lane == 0 && chunk < chunks) sums[half] = acc;
        __syncthreads();
        for (u32 i = 0; i < smaller(halves, chunks - first); i++) total = first + i == 0 ? sums[i] : total + sums[i];
        __syncthreads();
    }
    return total;
}
