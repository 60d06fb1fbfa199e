// Rules 5 and 10: logits and the choice of a token. A block has a row.
#include "contract.cuh"

constexpr u32 SAMPLE_THREADS = 1024;

// logits = logits / by.
KERNEL divide(float* logits, float by, u32 n) {
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < n; at += gridDim.x * blockDim.x) logits[at] = logits[at] / by;
}

// Divides the positive and multiplies the negative logits of some tokens, each of which is there once.
KERNEL penalise(float* logits, const u32* __restrict__ tokens, float penalty, u32 count) {
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < count; at += gridDim.x * blockDim.x) {
        const float logit = logits[tokens[at]];
        logits[tokens[at]] = logit < 0.0f ? logit * penalty : logit / penalty;
    }
}

// A token and its logit; the larger one, of equal ones the lower, is ahead.
struct Best {
    float logit;
    u32 token;

    __device__ __forceinline__ void meet(float other, u32 other_token) {
        if (other > logit || (other == logit && other_token < token)) logit = other, token = other_token;
    }
};

// The token with the largest logit of each row, the lowest among equals; and the lowest whose logit is not finite, or ALL.
KERNEL __launch_bounds__(SAMPLE_THREADS) argmax(const float* __restrict__ logits, u32* __restrict__ tokens,
                                                u32* __restrict__ faults, u32 n) {
    SHARED(float, best_logits, SAMPLE_THREADS / WARP);
    SHARED(u32, best_tokens, SAMPLE_THREADS / WARP);
    SHARED(u32, bad_tokens, SAMPLE_THREADS / WARP);
    logits += u64(blockIdx.x) * n;
    Best best = {-infinity(), ALL};
    u32 bad = ALL;
    for (u32 at = threadIdx.x; at < n; at += blockDim.x) {
        const float logit = logits[at];
        best.meet(logit, at);
        if (!is_finite(logit)) bad = smaller(bad, at);
    }
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(ALL, best.logit, lanes);
        best.meet(other, __shfl_xor_sync(ALL, best.token, lanes));
        bad = smaller(bad, __shfl_xor_sync(ALL, bad, lanes));
    }
    const u32 warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) best_logits[warp] = best.logit, best_tokens[warp] = best.token, bad_tokens[warp] = bad;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (u32 i = 1; i < blockDim.x / WARP; i++) {
        best.meet(best_logits[i], best_tokens[i]);
        bad = smaller(bad, bad_tokens[i]);
    }
    tokens[blockIdx.x] = best.token;
    faults[blockIdx.x] = bad;
}
