// Some columns of rows to other places, as latent attention brings heads apart and together: a block for each row.
#include "contract.cuh"

// Row i of `out` gets `n` values from column `to` on: those of x from column `from` on, of the row that `picked` says, or of row i
// where it is null. Rows of each side begin as many values apart as its stride says.
KERNEL arrange(const float* __restrict__ x, const u32* __restrict__ picked, float* __restrict__ out, u32 n, u32 x_stride, u32 from,
               u32 out_stride, u32 to) {
    const u32 row = picked == nullptr ? blockIdx.x : picked[blockIdx.x];
    x += u64(row) * x_stride + from;
    out += u64(blockIdx.x) * out_stride + to;
    // Where all of both sides begins at multiples of sixteen bytes.
    if ((n | x_stride | from | out_stride | to) % 4 == 0) {
        for (u32 at = threadIdx.x * 4; at < n; at += blockDim.x * 4) {
            *reinterpret_cast<float4*>(out + at) = load_float4(x + at);
        }
        return;
    }
    for (u32 at = threadIdx.x; at < n; at += blockDim.x) out[at] = x[at];
}
