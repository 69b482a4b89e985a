// Sum of two arrays: what autograd needs where a tensor is used more than once.
//
//   forward   y = a + b             backward   da = db = dy, without a kernel
//
// Threads: grid-stride, four elements at a time as in relu.cu.
#include "common/types.cuh"

extern "C" __global__ void add_forward(
    const storage_t* __restrict__ a,  // (count)
    const storage_t* __restrict__ b,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
#pragma unroll 4
    FOR_EACH_INDEX(i, count) y[i] = a[i] + b[i];
}
