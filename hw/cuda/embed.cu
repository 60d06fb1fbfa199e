// Rows of the embedding table, widened and multiplied: a block for each position.
#include "contract.cuh"

template <class T>
__device__ __forceinline__ void embed(const byte* __restrict__ table, const u32* __restrict__ tokens, float* __restrict__ out,
                                      u32 hidden, float multiplier) {
    const byte* const row = table + u64(tokens[blockIdx.x]) * hidden * T::BYTES;
    out += u64(blockIdx.x) * hidden;
    // Only such rows all begin at a multiple of sixteen bytes.
    if (hidden % 8 == 0) {
        for (u32 at = threadIdx.x * 8; at < hidden; at += blockDim.x * 8) {
            float eight[8];
            T::eight(row + u64(at) * T::BYTES, eight);
            float4* const to = reinterpret_cast<float4*>(out + at);
            to[0] = make_float4(eight[0] * multiplier, eight[1] * multiplier, eight[2] * multiplier, eight[3] * multiplier);
            to[1] = make_float4(eight[4] * multiplier, eight[5] * multiplier, eight[6] * multiplier, eight[7] * multiplier);
        }
        return;
    }
    for (u32 at = threadIdx.x; at < hidden; at += blockDim.x) out[at] = T::value(row + u64(at) * T::BYTES) * multiplier;
}

KERNEL embed_f32(const byte* table, const u32* tokens, float* out, u32 hidden, float multiplier) {
    embed<F32>(table, tokens, out, hidden, multiplier);
}

KERNEL embed_bf16(const byte* table, const u32* tokens, float* out, u32 hidden, float multiplier) {
    embed<Bf16>(table, tokens, out, hidden, multiplier);
}

KERNEL embed_f16(const byte* table, const u32* tokens, float* out, u32 hidden, float multiplier) {
    embed<F16>(table, tokens, out, hidden, multiplier);
}
