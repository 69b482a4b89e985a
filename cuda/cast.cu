// Conversion between float32 and bfloat16: to nearest, ties to even; a NaN stays one.
// Element types: bfloat16.
//
// Threads: one element each, grid-stride.
#include "common/types.cuh"

extern "C" __global__ void cast_to_bfloat16(
    const float* __restrict__ x,  // (count)
    storage_t* __restrict__ y,    // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) y[i] = x[i];
}

extern "C" __global__ void cast_from_bfloat16(
    const storage_t* __restrict__ x,  // (count)
    float* __restrict__ y,            // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) y[i] = x[i];
}
