// float32 as the sum of bfloat16 planes, which Hopper's tensor cores multiply (common/hopper_convolution.cuh).
// Element types: bfloat16.
//
//   y[row, k, :] = bfloat16(x[row, :] - y[row, 0, :] - ... - y[row, k - 1, :])
//
// Each plane has 8 bits, rounded to nearest: what one leaves has 16 bits, what two leave 8, at most 2^-16 of x, and three leave
// nothing (but of numbers below 2^-100). Every difference is exact. Of an infinity or a NaN, and of what rounds to an infinity,
// the other planes are 0: infinity - infinity would make it a NaN.
//
// 8 or 10 bytes move for each element; a thread has 16 bytes at a time, four of them under way. Not measured. Threads: 4
// elements each, grid-stride; c is a multiple of 4.
#include "common/piece.cuh"

extern "C" __global__ void split_planes(
    const float* __restrict__ x,  // (rows, c)
    storage_t* __restrict__ y,    // (rows, planes * c)
    int64 rows, int c, int planes) {
    for_each_of_grid<4>(
        rows * c / 4, [&](int64 i) { return load_here((const Piece*)x + i); },
        [&](int64 i, const Piece& four) {
            storage_t* const to = y + 4 * i / c * (planes - 1) * c + 4 * i;
            float left[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) left[j] = __uint_as_float(four.words[j]);
            for (int k = 0; k < planes; ++k) {
                const unsigned pairs[2] = {bfloat16_pair(left[0], left[1]), bfloat16_pair(left[2], left[3])};
                *(uint64*)(to + k * c) = pairs[0] | (uint64)pairs[1] << 32;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float plane = __uint_as_float(j % 2 ? pairs[j / 2] & 0xFFFF0000u : pairs[j / 2] << 16);
                    left[j] = isfinite(plane) ? left[j] - plane : 0;
                }
            }
        });
}
