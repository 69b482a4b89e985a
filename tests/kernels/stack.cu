// Recursion: `levels` frames of about 1 KB each.
#include "common/types.cuh"

__device__ __attribute__((noinline)) int descend(int levels, volatile int* keep) {
    volatile int frame[240];
    for (int i = 0; i < 240; ++i) frame[i] = levels + i;
    const int below = levels > 1 ? descend(levels - 1, frame) : 0;
    return below + frame[levels % 240] - levels - levels % 240 + (keep ? 1 : 0);
}

extern "C" __global__ void recurse(
    int* out,  // (threads)
    int levels, int threads) {
    __syncthreads();
    volatile int start = 0;
    out[threadIdx.x] = descend(levels, &start);
    __syncthreads();
}
