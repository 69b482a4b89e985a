// Conversion between float32 and bfloat16: to nearest, ties to even; a NaN stays one.
// Element types: bfloat16.
//
// 6 bytes move for each element; 2048 threads with 8 loads in flight (common/in_flight.cuh) have 64 KB of float32 or 32 KB of
// bfloat16 on a multiprocessor, where 29 are needed. Threads: 8 elements each, grid-stride.
#include "common/in_flight.cuh"

extern "C" __global__ void cast_to_bfloat16(
    const float* __restrict__ x,  // (count)
    storage_t* __restrict__ y,    // (count)
    int64 count) {
    for_each_of_grid<8>(count, [&](int64 i) { return load_here(x + i); }, [&](int64 i, float value) { y[i] = value; });
}

extern "C" __global__ void cast_from_bfloat16(
    const storage_t* __restrict__ x,  // (count)
    float* __restrict__ y,            // (count)
    int64 count) {
    for_each_of_grid<8>(count, [&](int64 i) { return load_here(x + i); }, [&](int64 i, float value) { y[i] = value; });
}
