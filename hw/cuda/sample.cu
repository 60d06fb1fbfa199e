// Rules 5 and 10: logits and the choice of a token. A block has a row.
#include "contract.cuh"

constexpr u32 SAMPLE_THREADS = 1024;

// logits = logits / by.
KERNEL divide(float* logits, float by, u32 n) {
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < n; at += gridDim.x * blockDim.x) logits[at] = logits[at] / by;
}

// Divides the positive and multiplies the negative logits of some tokens, each of which is there once. ALL is no token: lists of
// recorded steps have more places than tokens.
KERNEL penalise(float* logits, const u32* __restrict__ tokens, float penalty, u32 count) {
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < count; at += gridDim.x * blockDim.x) {
        const u32 token = tokens[at];
        if (token == ALL) continue;
        const float logit = logits[token];
        logits[token] = logit < 0.0f ? logit * penalty : logit / penalty;
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

// A row's candidates, in their order: by logit descending, then by token. A key is that order in one number.
struct Candidates {
    const float* logits;
    const u64* weights;
    u32 n;
    // The key of the last that is left.
    u64 last;

    __device__ __forceinline__ u64 key(u32 token) const {
        // The two zeros are equal logits.
        const u32 bits = __float_as_uint(logits[token] + 0.0f);
        const u32 descending = bits >> 31 ? bits : ~bits & 0x7fffffffu;
        return u64(descending) << 32 | token;
    }
};

constexpr u32 DIGITS = 16;

// Lanes share numbers out: each gives half of those that it still has away, for the other half of another lane's, until it has one,
// number lane % COUNT of a part of the warp. A function for each step, so that numbers stay in registers.
template <u32 HALF, u32 COUNT>
__device__ __forceinline__ void share_out(u64 (&own)[COUNT]) {
    if constexpr (HALF > 0) {
        const bool upper = (threadIdx.x & HALF) != 0;
#pragma unroll
        for (u32 i = 0; i < HALF; i++) {
            const u64 low = own[i], high = own[i + HALF];
            own[i] = (upper ? high : low) + __shfl_xor_sync(ALL, upper ? low : high, HALF);
        }
        share_out<HALF / 2>(own);
    }
}

// Room for sums of a block.
struct Sums {
    u64* of_warps;
    u64* all;

    // Adds up what threads have of COUNT numbers; all threads get the sums. COUNT is a power of two, half a warp at most.
    template <u32 COUNT>
    __device__ __forceinline__ void add(u64 (&own)[COUNT]) const {
        const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        share_out<COUNT / 2>(own);
        u64 sum = own[0];
#pragma unroll
        for (u32 lanes = COUNT; lanes < WARP; lanes *= 2) sum += __shfl_xor_sync(ALL, sum, lanes);
        if (lane < COUNT) of_warps[warp * COUNT + lane] = sum;
        __syncthreads();
        if (threadIdx.x < COUNT) {
            u64 of_block = 0;
            for (u32 i = 0; i < blockDim.x / WARP; i++) of_block += of_warps[i * COUNT + threadIdx.x];
            all[threadIdx.x] = of_block;
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) own[i] = all[i];
    }
};

// No key: it stands behind all.
constexpr u64 NOBODY = ~u64(0);

// The key of the first candidate with which the sum of `measure(weight)` over all up to it is beyond `target`, or NOBODY. Four bits
// of the key are found at a time.
template <class Measure>
__device__ __forceinline__ u64 first_beyond(const Candidates& of, const Sums& sums, u64 target, Measure measure) {
    u64 prefix = 0;
    for (u32 shift = 60;; shift -= 4) {
        // No token has this digit but 0.
        if (shift < 32 && shift > 0 && (of.n - 1) >> shift == 0) {
            prefix <<= 4;
            continue;
        }
        u64 own[DIGITS] = {};
        for (u32 token = threadIdx.x; token < of.n; token += blockDim.x) {
            const u64 weight = of.weights[token], key = of.key(token);
            if (weight == 0 || key > of.last || (shift < 60 && key >> (shift + 4) != prefix)) continue;
#pragma unroll
            for (u32 digit = 0; digit < DIGITS; digit++) own[digit] += (key >> shift & 15u) == digit ? measure(weight) : 0;
        }
        sums.add(own);
        u32 found = DIGITS;
#pragma unroll
        for (u32 digit = 0; digit < DIGITS; digit++) {
            if (found < DIGITS) continue;
            if (own[digit] > target) {
                found = digit;
            } else {
                target -= own[digit];
            }
        }
        if (found == DIGITS) return NOBODY;
        prefix = prefix << 4 | found;
        if (shift == 0) return prefix;
    }
}

// A share, in multiples of 2^-32, of a sum, rounded up: the least whole number that reaches it.
__device__ __forceinline__ u64 share_of(u64 sum, u64 share) {
    const u64 low = sum * share, high = __umul64hi(sum, share);
    return (high << 32 | low >> 32) + ((low & 0xffffffffu) != 0 ? 1 : 0);
}

// The sum of the weights that are left.
__device__ __forceinline__ u64 sum_of(const Candidates& of, const Sums& sums) {
    u64 own[1] = {};
    for (u32 token = threadIdx.x; token < of.n; token += blockDim.x) own[0] += of.key(token) > of.last ? 0 : of.weights[token];
    sums.add(own);
    return own[0];
}

// Tokens of rows whose temperatures are above 0, by one draw each. `tokens` and `faults` are what argmax found, and rows that it found
// faults in, or that take the largest logit, are left as they are; shares are in multiples of 2^-32, `top_p` NOBODY where it keeps all,
// `min_p` 0; `top_k` is 0 where it keeps all. `weights` is room for a number for each logit.
KERNEL __launch_bounds__(SAMPLE_THREADS) sample(const float* __restrict__ logits, const u32* __restrict__ faults,
                                                const float* __restrict__ temperatures, const u32* __restrict__ top_k,
                                                const u64* __restrict__ top_p, const u64* __restrict__ min_p,
                                                const u64* __restrict__ draws, u64* weights, u32* tokens, u32 n) {
    SHARED(u64, of_warps, SAMPLE_THREADS / WARP * DIGITS);
    SHARED(u64, all, DIGITS);
    const u32 row = blockIdx.x;
    const Sums sums = {of_warps, all};
    Candidates left = {logits + u64(row) * n, weights + u64(row) * n, n, NOBODY};
    if (faults[row] != ALL || !(temperatures[row] > 0.0f)) return;
    const float max = left.logits[tokens[row]], temperature = temperatures[row];
    // Until the first barrier each thread reads the weights that it wrote itself, and no others.
    for (u32 token = threadIdx.x; token < n; token += blockDim.x) {
        const float x = (left.logits[token] - max) / temperature;
        // The product is exact. Beside 2^52 there is room for whole numbers only, and these are the low bits.
        const double rounded = double(exponential(x)) * 4294967296.0 + 4503599627370496.0;
        const u64 whole = u64(__double_as_longlong(rounded) - __double_as_longlong(4503599627370496.0));
        weights[u64(row) * n + token] = x < -23.0f ? 0 : whole;
    }
    const auto one = [](u64) { return u64(1); };
    const auto weight = [](u64 weight) { return weight; };
    // Each choice leaves a run from the front.
    const auto keep_until = [&](u64 key) { left.last = key < left.last ? key : left.last; };
    if (top_k[row] > 0) keep_until(first_beyond(left, sums, top_k[row] - 1, one));
    if (top_p[row] != NOBODY) {
        const u64 least = share_of(sum_of(left, sums), top_p[row]);
        keep_until(first_beyond(left, sums, least > 0 ? least - 1 : 0, weight));
    }
    if (min_p[row] > 0) {
        const u32 first = u32(first_beyond(left, sums, 0, one));
        const u64 least = share_of(left.weights[first], min_p[row]);
        // The first one reaches every share, so that one stands before whoever does not.
        const u64 end = first_beyond(left, sums, 0, [=](u64 weight) { return u64(weight < least ? 1 : 0); });
        if (end != NOBODY) keep_until(end - 1);
    }
    const u64 target = __umul64hi(draws[row], sum_of(left, sums));
    const u64 chosen = first_beyond(left, sums, target, weight);
    if (threadIdx.x == 0) tokens[row] = u32(chosen);
}
