// What the doctor runs: shared memory and a barrier, for which the host device needs fibers.
#include "common/types.cuh"

extern "C" __global__ void doctor_reverse(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int count) {
    SHARED_ARRAY(storage_t, tile, [64]);
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[count - 1 - threadIdx.x];
}
