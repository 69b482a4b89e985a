// Rectified linear unit.
//
//   forward   y  = max(x, 0), a NaN stays a NaN
//   backward  dx = dy where y > 0, else 0          (the output alone is saved)
//
// Threads: grid-stride; four elements at a time, whose loads begin before the first is stored, keep a GPU's memory busy
// (common/in_flight.cuh says how many that takes). No sums: the result does not depend on any order.
#include "common/types.cuh"

extern "C" __global__ void relu_forward(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
#pragma unroll 4
    FOR_EACH_INDEX(i, count) y[i] = x[i] <= storage_t(0) ? storage_t(0) : x[i];
}

extern "C" __global__ void relu_backward(
    const storage_t* __restrict__ y,   // (count)
    const storage_t* __restrict__ dy,  // (count)
    storage_t* __restrict__ dx,        // (count)
    int64 count) {
#pragma unroll 4
    FOR_EACH_INDEX(i, count) dx[i] = y[i] > storage_t(0) ? dy[i] : storage_t(0);
}
