// Rotary position embedding in place, by the tables that the CPU makes: a block for each position, a thread for a pair.
#include "contract.cuh"

// `values` is positions x heads x head_dim, the tables are positions x half. `neighbours`: pairs are neighbours, not a half apart.
KERNEL rope(float* values, const u32* __restrict__ positions, const float* __restrict__ cosines,
            const float* __restrict__ sines, u32 heads, u32 head_dim, u32 half, u32 neighbours) {
    const u64 table = u64(positions[blockIdx.x]) * half;
    values += u64(blockIdx.x) * heads * head_dim;
    for (u32 at = threadIdx.x; at < heads * half; at += blockDim.x) {
        const u32 pair = at % half;
        float* const head = values + u64(at / half) * head_dim;
        float* const first = head + (neighbours ? 2 * pair : pair);
        float* const second = first + (neighbours ? 1 : half);
        const float x = *first, y = *second, cosine = cosines[table + pair], sine = sines[table + pair];
        *first = x * cosine - y * sine;
        *second = y * cosine + x * sine;
    }
}
