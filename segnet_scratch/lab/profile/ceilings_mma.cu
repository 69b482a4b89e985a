// The most that the tensor cores of this GPU multiply in a second by mma.sync, operands in registers: CHAINS independent
// sums a warp, so that no product waits for the one before. wgmma, which reads shared memory, can do more on sm_90.
// Element types: tf32, bf16; sm_80 and newer.
//
// Factors are 1: a sum is the number of its products. Threads: whole warps; thread i writes y[i], so that the compiler
// cannot leave the sums out.
#include "common/warp_tile.cuh"

#define CHAINS 8

extern "C" __global__ void mma_ceiling(
    float* __restrict__ y,  // (count)
    int count, int rounds) {
    WarpTile<16, 8 * CHAINS> tile;
    typename WarpTile<16, 8 * CHAINS>::Step factors;
    const unsigned ones = MULTIPLY == BF16 ? 0x3F803F80u : 0x3F800000u;
#pragma unroll
    for (int i = 0; i < 4; ++i) factors.a[0][i] = ones;
#pragma unroll
    for (int i = 0; i < 2 * CHAINS; ++i) factors.b[i / 2][i % 2] = ones;
    __syncthreads();  // the warps of a block begin together
    for (int round = 0; round < rounds; ++round) tile.add_product(factors);
    float total = 0;
#pragma unroll
    for (int i = 0; i < 4 * CHAINS; ++i) total += tile.sums[0][i / 4][i % 4];
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread < count) y[thread] = total;
}
