// Rules 4 and 6: routers, who uses which expert, gates and the combination of experts.
#include "contract.cuh"

// A router has at most so many outputs, groups and experts of a position: a lane of a warp owns 32 candidates, a group, a choice.
constexpr u32 EXPERTS_MAX = 1024;
constexpr u32 CHOSEN_MAX = WARP;
// No expert has this number, and no group as ties know it; it stands behind the experts.
constexpr u32 NONE = 0x7fffffffu;

enum Score : u32 { SOFTMAX, SOFTMAX_OF_SELECTED, SIGMOID };

// The first 64 bits of ChaCha with eight rounds: the draw of core/src/random.rs for a tie.
struct Ties {
    u64 seed;
    u32 layer;
    u32 position;

    static __device__ __forceinline__ u32 turned(u32 x, u32 by) { return x << by | x >> (32 - by); }
    static __device__ __forceinline__ void quarter(u32& a, u32& b, u32& c, u32& d) {
        a += b, d = turned(d ^ a, 16);
        c += d, b = turned(b ^ c, 12);
        a += b, d = turned(d ^ a, 8);
        c += d, b = turned(b ^ c, 7);
    }
    __device__ __noinline__ u64 hash(u32 candidate) const {
        const u32 purpose = 3;
        u32 s[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u, u32(seed), u32(seed >> 32), candidate, layer,
                     purpose,     0,           0,           0,           0,         0,               position,  0};
        for (u32 round = 0; round < 4; round++) {
            quarter(s[0], s[4], s[8], s[12]);
            quarter(s[1], s[5], s[9], s[13]);
            quarter(s[2], s[6], s[10], s[14]);
            quarter(s[3], s[7], s[11], s[15]);
            quarter(s[0], s[5], s[10], s[15]);
            quarter(s[1], s[6], s[11], s[12]);
            quarter(s[2], s[7], s[8], s[13]);
            quarter(s[3], s[4], s[9], s[14]);
        }
        return u64(s[1] + 0x3320646eu) << 32 | (s[0] + 0x61707865u);
    }
    // Whether a candidate stands before another; nobody stands last.
    __device__ __forceinline__ bool before(float a, u32 id_a, float b, u32 id_b) const {
        if (id_a == NONE || id_b == NONE) return id_a != NONE;
        if (a != b) return a > b;
        const u64 hash_a = hash(id_a), hash_b = hash(id_b);
        return hash_a != hash_b ? hash_a < hash_b : id_a < id_b;
    }
    // The first of a warp's candidates, in all lanes.
    __device__ __forceinline__ void first_of_warp(float& score, u32& id) const {
#pragma unroll
        for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
            const float other = __shfl_xor_sync(ALL, score, lanes);
            const u32 other_id = __shfl_xor_sync(ALL, id, lanes);
            if (other_id != id && before(other, other_id, score, id)) score = other, id = other_id;
        }
    }
};

// Which groups of experts stay: a bit for each. A lane has a group.
__device__ __forceinline__ u32 kept_groups(const Ties& ties, const float* scores, const u32* eligible, u32 width, u32 groups,
                                           u32 keep, u32 by_two) {
    const u32 lane = threadIdx.x, size = width / groups > 0 ? width / groups : 1;
    float best = -infinity(), second = -infinity();
    for (u32 id = lane * size; lane < groups && id < smaller(width, (lane + 1) * size); id++) {
        const float score = scores[id];
        if (!eligible[id]) continue;
        if (score > best) {
            second = best, best = score;
        } else if (score > second) {
            second = score;
        }
    }
    // Groups take their ties from numbers above those of experts.
    u32 number = best > -infinity() ? ALL - lane : NONE, kept = 0;
    const float score = by_two ? best + (second > -infinity() ? second : 0.0f) : best;
    for (u32 round = 0; round < keep; round++) {
        float first = score;
        u32 id = number;
        ties.first_of_warp(first, id);
        if (id == NONE) break;
        if (id == number) number = NONE;
        kept |= 1u << (ALL - id);
    }
    return kept;
}

// The k first of the candidates from `from` on that are open, one a lane, in their order; NONE where there are no more.
template <class Open>
__device__ __forceinline__ u32 chosen_of(const Ties& ties, const float* scores, u32 from, u32 end, u32 k, Open open) {
    u32 taken = 0, chosen = NONE;
    for (u32 round = 0; round < k; round++) {
        float score = 0.0f;
        u32 id = NONE;
        for (u32 at = from + threadIdx.x, own = 0; at < end; at += WARP, own++) {
            if (taken >> own & 1u || !open(at)) continue;
            if (ties.before(scores[at], at, score, id)) score = scores[at], id = at;
        }
        ties.first_of_warp(score, id);
        if (id == NONE) break;
        if ((id - from) % WARP == threadIdx.x) taken |= 1u << ((id - from) / WARP);
        if (round == threadIdx.x) chosen = id;
    }
    return chosen;
}

// What a warp routes a position in.
struct Route {
    u32* sorted;
    float* shares;
    float* sums;

    // Puts what lanes have chosen in order of number, with the shares of each; says how many there are.
    __device__ __forceinline__ u32 put(u32 chosen, float share, u32 k) const {
        u32 place = 0, count = 0;
        for (u32 i = 0; i < k; i++) {
            const u32 other = __shfl_sync(ALL, chosen, i);
            place += other < chosen || (other == chosen && i < threadIdx.x) ? 1 : 0;
            count += other == NONE ? 0 : 1;
        }
        if (threadIdx.x < k) {
            sorted[place] = chosen;
            if (chosen != NONE) shares[place] = share;
        }
        __syncwarp();
        return count;
    }

    // Writes experts, whose number is `less` less than what was chosen, and their weights.
    __device__ __forceinline__ void write(u32 count, u32 k, u32 less, u32 normalise, float more, float scaling, u32* experts,
                                          float* weights) const {
        float sum = 0.0f;
        for (u32 i = 0; i < count; i++) sum += shares[i];
        sum += more;
        if (threadIdx.x >= k) return;
        const u32 lane = threadIdx.x;
        experts[u64(blockIdx.x) * k + lane] = lane < count ? sorted[lane] - less : NONE;
        float weight = 0.0f;
        if (lane < count) weight = (normalise ? shares[lane] / sum : shares[lane]) * scaling;
        weights[u64(blockIdx.x) * k + lane] = weight;
    }
};

// Softmax of a row in shared memory by one warp, as the CPU's: its sum is a dot product with ones.
__device__ __forceinline__ void softmax(float* values, u32 n, float* sums) {
    float most = -infinity();
    for (u32 i = threadIdx.x; i < n; i += WARP) most = values[i] > most ? values[i] : most;
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(ALL, most, lanes);
        most = other > most ? other : most;
    }
    for (u32 i = threadIdx.x; i < n; i += WARP) values[i] = exponential(values[i] - most);
    __syncwarp();
    const float sum = block_dot(n, sums, [=](u32 k) { return values[k]; }, [](u32) { return 1.0f; });
    for (u32 i = threadIdx.x; i < n; i += WARP) values[i] = values[i] / sum;
}

// Routes positions by the outputs of a router (positions x width): a warp for each. `experts` and `weights` are positions x k, by
// number ascending, NONE where fewer are eligible; a position with an output that is not finite gets a fault instead. `correction`
// is of sigmoids alone. `groups` is 0 where there is no limit; `keep` of them stay, scored by their largest or their two largest.
KERNEL __launch_bounds__(WARP) route(const float* __restrict__ logits, const u32* __restrict__ eligible,
                                     const float* __restrict__ correction, const u32* __restrict__ positions,
                                     u32* __restrict__ experts, float* __restrict__ weights, u32* __restrict__ faults, u32 width,
                                     u32 k, u32 score, u32 normalise, float scaling, u32 groups, u32 keep, u32 by_two, u64 seed,
                                     u32 layer) {
    SHARED(float, scores, EXPERTS_MAX);
    SHARED(float, corrected, EXPERTS_MAX);
    SHARED(u32, open, EXPERTS_MAX);
    SHARED(u32, sorted, CHOSEN_MAX);
    SHARED(float, shares, CHOSEN_MAX);
    SHARED(float, sums, WARP / LANES);
    const u32 lane = threadIdx.x, row = blockIdx.x;
    const Ties ties = {seed, layer, positions[row]};
    u32 fault = 0;
    for (u32 i = lane; i < width; i += WARP) {
        const float logit = logits[u64(row) * width + i];
        fault |= is_finite(logit) ? 0u : 1u;
        open[i] = eligible[i];
        scores[i] = score == SIGMOID ? sigmoid(logit) : score == SOFTMAX && !eligible[i] ? -infinity() : logit;
        corrected[i] = score == SIGMOID ? scores[i] + correction[i] : scores[i];
    }
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) fault |= __shfl_xor_sync(ALL, fault, lanes);
    if (lane == 0) faults[row] = fault;
    if (fault) return;
    if (score == SOFTMAX) softmax(scores, width, sums);
    // From here on lanes read what others wrote.
    __syncwarp();
    const float* const by = score == SIGMOID ? corrected : scores;
    const bool limited = groups != 0 && keep < groups;
    const u32 kept = limited ? kept_groups(ties, by, open, width, groups, keep, by_two) : 1u;
    const u32 size = !limited ? 0 : width / groups > 0 ? width / groups : 1;
    const u32 chosen = chosen_of(ties, by, 0, width, k, [=](u32 at) {
        const u32 group = size == 0 ? 0 : at / size;
        return open[at] && group < WARP && (kept >> group & 1u);
    });
    const Route found = {sorted, shares, sums};
    const u32 count = found.put(chosen, chosen == NONE ? 0.0f : scores[chosen], k);
    if (score == SOFTMAX_OF_SELECTED) {
        softmax(shares, count, sums);
        __syncwarp();
    }
    found.write(count, k, 0, normalise, score == SIGMOID ? 1e-20f : 0.0f, scaling, experts, weights);
}

// Routes positions by three levels: outputs of a router are first those of tiers, then of groups, then of experts. `first_child`
// has for each tier the first of its groups, for each group the first of its experts, and at its end that of nobody: the width.
// A softmax at each level, over the tiers that are `active`, the groups of a tier, the experts of a group; a weight is the product.
// A position has `best_tiers` x `best_groups` x `best_experts` places.
KERNEL __launch_bounds__(WARP) route_tiers(const float* __restrict__ logits, const u32* __restrict__ active,
                                           const u32* __restrict__ first_child, const u32* __restrict__ positions,
                                           u32* __restrict__ experts, float* __restrict__ weights, u32* __restrict__ faults,
                                           u32 width, u32 actives, u32 tiers, u32 groups, u32 best_tiers, u32 best_groups,
                                           u32 best_experts, u32 normalise, float scaling, u64 seed, u32 layer) {
    SHARED(float, scores, EXPERTS_MAX);
    SHARED(float, of_tiers, WARP);
    SHARED(u32, sorted, CHOSEN_MAX);
    SHARED(float, shares, CHOSEN_MAX);
    SHARED(float, sums, WARP / LANES);
    const u32 lane = threadIdx.x, row = blockIdx.x, k = best_tiers * best_groups * best_experts;
    const Ties ties = {seed, layer, positions[row]};
    u32 fault = 0;
    for (u32 i = lane; i < width; i += WARP) {
        scores[i] = logits[u64(row) * width + i];
        fault |= is_finite(scores[i]) ? 0u : 1u;
    }
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) fault |= __shfl_xor_sync(ALL, fault, lanes);
    if (lane == 0) faults[row] = fault;
    if (fault) return;
    __syncwarp();
    u32 is_active = 0;
    for (u32 i = 0; i < actives; i++) is_active |= 1u << active[i];
    if (lane < actives) of_tiers[lane] = scores[active[lane]];
    softmax(of_tiers, actives, sums);
    if (lane < actives) scores[active[lane]] = of_tiers[lane];
    __syncwarp();
    u32 chosen = NONE, count = 0;
    float share = 0.0f;
    const auto any = [](u32) { return true; };
    const u32 chosen_tiers = chosen_of(ties, scores, 0, tiers, best_tiers, [=](u32 tier) { return is_active >> tier & 1u; });
    for (u32 t = 0; t < best_tiers; t++) {
        const u32 tier = __shfl_sync(ALL, chosen_tiers, t);
        if (tier == NONE) break;
        // The groups of the last tier end where the experts begin. Lanes choose among what they wrote themselves.
        const u32 from = first_child[tier], end = tier + 1 < tiers ? first_child[tier + 1] : tiers + groups;
        softmax(scores + from, end - from, sums);
        const u32 chosen_groups = chosen_of(ties, scores, from, end, best_groups, any);
        for (u32 g = 0; g < best_groups; g++) {
            const u32 group = __shfl_sync(ALL, chosen_groups, g);
            if (group == NONE) break;
            const u32 first = first_child[group], last = first_child[group + 1];
            softmax(scores + first, last - first, sums);
            __syncwarp();
            const u32 chosen_experts = chosen_of(ties, scores, first, last, best_experts, any);
            for (u32 e = 0; e < best_experts; e++) {
                const u32 expert = __shfl_sync(ALL, chosen_experts, e);
                if (expert == NONE) break;
                if (count == lane) chosen = expert, share = scores[tier] * scores[group] * scores[expert];
                count++;
            }
        }
    }
    const Route found = {sorted, shares, sums};
    count = found.put(chosen, share, k);
    found.write(count, k, tiers + groups, normalise, 0.0f, scaling, experts, weights);
}

// Routes positions by the sparse mixer: the best expert, weighed by a softmax over those whose relative distance from it is at most
// twice the jitter; then the best of the others, without the first. A position has two places.
KERNEL __launch_bounds__(WARP) route_sparsely(const float* __restrict__ logits, const u32* __restrict__ eligible,
                                              const u32* __restrict__ positions, u32* __restrict__ experts,
                                              float* __restrict__ weights, u32* __restrict__ faults, u32 width, float jitter,
                                              u32 normalise, float scaling, u64 seed, u32 layer) {
    SHARED(float, near, EXPERTS_MAX);
    SHARED(u32, sorted, CHOSEN_MAX);
    SHARED(float, shares, CHOSEN_MAX);
    SHARED(float, sums, WARP / LANES);
    const u32 lane = threadIdx.x, row = blockIdx.x;
    const float* const scores = logits + u64(row) * width;
    const Ties ties = {seed, layer, positions[row]};
    u32 fault = 0;
    for (u32 i = lane; i < width; i += WARP) fault |= is_finite(scores[i]) ? 0u : 1u;
    fault = __ballot_sync(ALL, fault);
    if (lane == 0) faults[row] = fault ? 1 : 0;
    if (fault) return;
    u32 first = NONE, chosen = NONE;
    float share = 0.0f;
    for (u32 round = 0; round < 2; round++) {
        const auto open = [=](u32 at) { return eligible[at] && at != first; };
        const u32 best = __shfl_sync(ALL, chosen_of(ties, scores, 0, width, 1, open), 0);
        if (best == NONE) break;
        const float most = scores[best];
        // Those that are near stand together, ascending: the softmax adds them in that order.
        u32 count = 0, place = 0;
        for (u32 base = 0; base < width; base += WARP) {
            const u32 at = base + lane;
            bool is_near = false;
            if (at < width && open(at)) {
                const float score = scores[at], magnitude = score < 0.0f ? -score : score;
                is_near = !((most - score) / (magnitude < most ? most : magnitude) > 2.0f * jitter);
            }
            const u32 all = __ballot_sync(ALL, is_near), before = count + __popc(all & ((1u << lane) - 1u));
            if (is_near) near[before] = scores[at];
            if (at == best) place = before;
            count += __popc(all);
        }
        __syncwarp();
        softmax(near, count, sums);
        __syncwarp();
        const float found = near[__shfl_sync(ALL, place, best % WARP)];
        if (lane == round) chosen = best, share = found;
        first = best;
        __syncwarp();
    }
    const Route found = {sorted, shares, sums};
    const u32 count = found.put(chosen, share, 2);
    found.write(count, 2, 0, normalise, 0.0f, scaling, experts, weights);
}

constexpr u32 USERS_THREADS = 256;

// Who uses which expert, between the router and the products. Of each choice (positions x k, `count` in all; those of a position with
// a fault are none) `places` says, by the expert's number, where it stands among some experts of the layer, or NONE, and `begins`, by
// that place, where its weights begin. Experts that are used come one after another: of each of `room` of them `weights_at` is where its
// weights begin and `first_user` its first user, and behind the last one there is nobody. `users` has the position of each user,
// those of an expert ascending, and 0 where there is none; `results` says which user each choice is, counted from `base` on, and NONE if
// it is none; those of other experts of the layer stay as they are.
//
// A block for each of these experts. Each goes through all choices by itself, so that nothing is counted by two.
KERNEL __launch_bounds__(USERS_THREADS) find_users(const u32* __restrict__ experts, const u32* __restrict__ faults,
                                                   const u32* __restrict__ places, const u64* __restrict__ begins,
                                                   u64* __restrict__ weights_at, u32* __restrict__ first_user,
                                                   u32* __restrict__ users, u32* __restrict__ results, u32 count, u32 k, u32 room,
                                                   u32 base) {
    SHARED(u32, used, EXPERTS_MAX / WARP);
    SHARED(u32, before_of, USERS_THREADS / WARP);
    SHARED(u32, all_of, USERS_THREADS / WARP);
    SHARED(u32, found, USERS_THREADS / WARP);
    const u32 own = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const auto is_none = [=](u32 at) { return at >= count || faults[at / k] != 0 || experts[at] == NONE; };
    const auto place = [=](u32 at) { return is_none(at) ? NONE : places[experts[at]]; };
    // A bit for each expert that somebody uses, a word of them for each turn of a warp.
    for (u32 word = warp; word < pieces(gridDim.x, WARP); word += warps) {
        u32 bits = 0;
        for (u32 at = lane; at < count; at += WARP) {
            const u32 of = place(at);
            bits |= of / WARP == word ? 1u << of % WARP : 0u;
        }
#pragma unroll
        for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) bits |= __shfl_xor_sync(ALL, bits, lanes);
        if (lane == 0) used[word] = bits;
    }
    u32 before = 0, all = 0;
    for (u32 at = threadIdx.x; at < count; at += blockDim.x) {
        const u32 of = place(at);
        before += of < own ? 1 : 0;
        all += of == NONE ? 0 : 1;
    }
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        before += __shfl_xor_sync(ALL, before, lanes);
        all += __shfl_xor_sync(ALL, all, lanes);
    }
    if (lane == 0) before_of[warp] = before, all_of[warp] = all;
    __syncthreads();
    before = all = 0;
    for (u32 i = 0; i < warps; i++) before += before_of[i], all += all_of[i];
    if (own == 0) {
        // What belongs to no expert.
        u32 experts_used = 0;
        for (u32 word = 0; word < pieces(gridDim.x, WARP); word++) experts_used += __popc(used[word]);
        for (u32 at = experts_used + threadIdx.x; at <= room; at += blockDim.x) {
            first_user[at] = all;
            if (at < room) weights_at[at] = 0;
        }
        for (u32 at = all + threadIdx.x; at < count; at += blockDim.x) users[at] = 0;
        for (u32 at = threadIdx.x; at < count; at += blockDim.x) {
            if (is_none(at)) results[at] = NONE;
        }
    }
    const u32 bits = used[own / WARP], bit = 1u << own % WARP;
    if ((bits & bit) == 0) return;
    if (threadIdx.x == 0) {
        u32 number = __popc(bits & (bit - 1u));
        for (u32 word = 0; word < own / WARP; word++) number += __popc(used[word]);
        weights_at[number] = begins[own];
        first_user[number] = before;
    }
    u32 next = before;
    for (u32 first = 0; first < count; first += blockDim.x) {
        const u32 at = first + threadIdx.x, mine = place(at) == own ? 1 : 0, all_mine = __ballot_sync(ALL, mine);
        if (lane == 0) found[warp] = __popc(all_mine);
        __syncthreads();
        u32 user = next + __popc(all_mine & ((1u << lane) - 1u));
        for (u32 i = 0; i < warps; i++) user += i < warp ? found[i] : 0, next += found[i];
        __syncthreads();
        if (mine != 0) users[user] = at / k, results[at] = base + user;
    }
}

// What is done to four values at once where there are four.
template <class F>
__device__ __forceinline__ void by_fours(u32 n, F f) {
    const u32 step = gridDim.x * blockDim.x * 4;
    for (u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * 4; at < n; at += step) f(at, smaller(4, n - at));
}

__device__ __forceinline__ float4 four_of(const float* from, u32 at, u32 count) {
    if (count == 4) return load_float4(from + at);
    return make_float4(from[at], count > 1 ? from[at + 1] : 0.0f, count > 2 ? from[at + 2] : 0.0f, 0.0f);
}

__device__ __forceinline__ void put_four(float* to, u32 at, u32 count, float4 four) {
    if (count == 4) {
        *reinterpret_cast<float4*>(to + at) = four;
        return;
    }
    to[at] = four.x;
    if (count > 1) to[at + 1] = four.y;
    if (count > 2) to[at + 2] = four.z;
}

// out = silu(gate) * up.
KERNEL swiglu(const float* __restrict__ gates, const float* __restrict__ ups, float* __restrict__ out, u32 n) {
    by_fours(n, [=](u32 at, u32 count) {
        const float4 gate = four_of(gates, at, count), up = four_of(ups, at, count);
        put_four(out, at, count,
                 make_float4(silu(gate.x) * up.x, silu(gate.y) * up.y, silu(gate.z) * up.z, silu(gate.w) * up.w));
    });
}

__device__ __forceinline__ float clamped(float gate, float up, float alpha, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    return (up + 1.0f) * (gate * sigmoid(alpha * gate));
}

// out = (up + 1) * (gate * sigmoid(alpha * gate)), within the limit.
KERNEL clamped_swiglu(const float* __restrict__ gates, const float* __restrict__ ups, float* __restrict__ out, u32 n,
                      float alpha, float limit) {
    by_fours(n, [=](u32 at, u32 count) {
        const float4 gate = four_of(gates, at, count), up = four_of(ups, at, count);
        put_four(out, at, count,
                 make_float4(clamped(gate.x, up.x, alpha, limit), clamped(gate.y, up.y, alpha, limit),
                             clamped(gate.z, up.z, alpha, limit), clamped(gate.w, up.w, alpha, limit)));
    });
}

// x = x + y * multiplier: what a block gives to the residual stream.
KERNEL add(float* x, const float* __restrict__ y, float multiplier, u32 n) {
    by_fours(n, [=](u32 at, u32 count) {
        const float4 a = four_of(x, at, count), b = four_of(y, at, count);
        put_four(x, at, count,
                 make_float4(a.x + b.x * multiplier, a.y + b.y * multiplier, a.z + b.z * multiplier, a.w + b.w * multiplier));
    });
}

// Brings values within -limit..limit.
KERNEL clip(float* values, float limit, u32 n) {
    by_fours(n, [=](u32 at, u32 count) {
        const float4 four = four_of(values, at, count);
        const auto within = [=](float x) { return x < -limit ? -limit : x > limit ? limit : x; };
        put_four(values, at, count, make_float4(within(four.x), within(four.y), within(four.z), within(four.w)));
    });
}

__device__ __forceinline__ float4 fused_four(float weight, float4 y, float4 sum) {
    return make_float4(fused(weight, y.x, sum.x), fused(weight, y.y, sum.y), fused(weight, y.z, sum.z), fused(weight, y.w, sum.w));
}

// Adds the weighted results of a position's experts to the residual stream, ascending, the shared expert last. `users` says which
// row of `results` each of k places is, NONE from where there is no expert. `shared` may be null, and `gates`, the outputs of its
// gate, where it has none. Blocks of x share the columns, y is the position.
KERNEL combine(float* x, const float* __restrict__ results, const u32* __restrict__ users, const float* __restrict__ weights,
               const float* __restrict__ shared, const float* __restrict__ gates, float multiplier, u32 hidden, u32 k) {
    const u32 row = blockIdx.y;
    // Rows begin at multiples of sixteen bytes, or values are taken one by one.
    const u32 most = hidden % 4 == 0 ? 4 : 1;
    for (u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * most; at < hidden; at += gridDim.x * blockDim.x * most) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 i = 0; i < k && users[row * k + i] != NONE; i++) {
            sum = fused_four(weights[row * k + i], four_of(results + u64(users[row * k + i]) * hidden, at, most), sum);
        }
        if (shared != nullptr) {
            const float gate = gates == nullptr ? 1.0f : sigmoid(gates[row]);
            sum = fused_four(gate, four_of(shared + u64(row) * hidden, at, most), sum);
        }
        const float4 old = four_of(x + u64(row) * hidden, at, most);
        put_four(x + u64(row) * hidden, at, most,
                 make_float4(old.x + sum.x * multiplier, old.y + sum.y * multiplier, old.z + sum.z * multiplier,
                             old.w + sum.w * multiplier));
    }
}
