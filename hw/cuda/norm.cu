// Rule 3: a block for each row. `x` and `out` may be one.
#include "contract.cuh"

constexpr u32 NORM_THREADS = 256;

// Rows of both begin `stride` values apart, of which `n` are normalised: a latent before the key that stands behind it.
KERNEL __launch_bounds__(NORM_THREADS) rms_norm(const float* x, const float* __restrict__ weight, float* out, u32 n, u32 stride,
                                                float eps) {
    SHARED(float, sums, NORM_THREADS / LANES);
    const float* const row = x + u64(blockIdx.x) * stride;
    const auto value = [=](u32 k) { return row[k]; };
    const float mean = block_dot(n, sums, value, value) / float(n);
    const float scale = 1.0f / __fsqrt_rn(mean + eps);
    for (u32 k = threadIdx.x; k < n; k += blockDim.x) out[u64(blockIdx.x) * stride + k] = (row[k] * scale) * weight[k];
}

// `bias` may be null.
KERNEL __launch_bounds__(NORM_THREADS) layer_norm(const float* x, const float* __restrict__ weight,
                                                  const float* __restrict__ bias, float* out, u32 n, float eps) {
    SHARED(float, sums, NORM_THREADS / LANES);
    const float* const row = x + u64(blockIdx.x) * n;
    const auto one = [](u32) { return 1.0f; };
    const float mean = block_dot(n, sums, [=](u32 k) { return row[k]; }, one) / float(n);
    const auto deviation = [=](u32 k) { return row[k] - mean; };
    const float scale = 1.0f / __fsqrt_rn(block_dot(n, sums, deviation, deviation) / float(n) + eps);
    for (u32 k = threadIdx.x; k < n; k += blockDim.x) {
        const float scaled = (deviation(k) * scale) * weight[k];
        out[u64(blockIdx.x) * n + k] = bias == nullptr ? scaled : scaled + bias[k];
    }
}
