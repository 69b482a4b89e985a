// float32 as planes of bfloat16 (common/planes.cuh), where no kernel before could write them.
// Element types: bfloat16.
//
//   y[row, k, :] = bfloat16(x[row, :] - y[row, 0, :] - ... - y[row, k - 1, :])
//
// 8 or 10 bytes move for each element; a thread has 16 bytes at a time, four of them in flight: 77 % of a
// copy's rate on an H200, over the maps of a step. Threads: 4 elements each, grid-stride; c is a multiple of 4.
#include "common/planes.cuh"

extern "C" __global__ void split_planes(
    const float* __restrict__ x,  // (rows, c)
    storage_t* __restrict__ y,    // (rows, planes * c)
    int64 rows, int c, int planes) {
    for_each_of_grid<4>(
        rows * c / 4, [&](int64 i) { return load_here((const Piece*)x + i); },
        [&](int64 i, const Piece& piece) { store_planes(y + 4 * i / c * (planes - 1) * c + 4 * i, c, planes, piece); });
}
