// Convolution, a rung that teaches: the implicit GEMM with tiles in shared memory, one result per thread. Stride 1.
// Element types: float32, float64, bfloat16.
//
//   fprop  y (pixels, o) = patches (pixels, kh kw c)  x  weight^T (kh kw c, o)
//
// Over conv2d_direct.cu: the 256 threads of a block compute 16 x 16 results together. For 16 terms of the depth at a time
// they bring 16 x 16 numbers of each factor to shared memory, one per thread, and every number is then used 16 times: a
// sixteenth of the reads from global memory. What is left undone: each multiply-add still reads both factors from shared
// memory, 8 bytes for 2 operations, and that is its bound (conv2d_tiled.cu: registers).
//
// Threads: (column, row) of 16 x 16 load depth `column` of pixel `row` and of output `row`, so that neighbouring threads read
// neighbouring channels (coalesced), and compute pixel `row`, output `column`. A row of `weights` is one number longer than
// the tile: 16 threads that read one depth of 16 outputs then meet 16 different banks.
// Worked index: thread (3, 5) of block (2, 0) loads, in round 1, depth 16 + 3 of pixel 2 * 16 + 5 = 37. With c = 8 that is
// tap 2 (the right one of the upper row), channel 3.
#include "common/types.cuh"

#define TILE 16

// Launch: grid ((n * oh * ow + TILE - 1) / TILE, (o + TILE - 1) / TILE), block (TILE, TILE)
extern "C" __global__ void __launch_bounds__(256) conv2d_forward_shared(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    SHARED_ARRAY(storage_t, patches, [TILE][TILE]);
    SHARED_ARRAY(storage_t, weights, [TILE][TILE + 1]);

    const int column = threadIdx.x, row = threadIdx.y, depth = kh * kw * c;
    const int64 pixels = (int64)n * oh * ow, pixel = (int64)blockIdx.x * TILE + row;
    const int iy0 = (int)(pixel / ow % oh) - pad_y, ix0 = (int)(pixel % ow) - pad_x;
    const int64 image = pixel / ow / oh * h * w * c;
    const int output = blockIdx.y * TILE + column, loaded_output = blockIdx.y * TILE + row;

    accumulate_t sum = 0;
    for (int first = 0; first < depth; first += TILE) {
        const int k = first + column, tap = k / c, iy = iy0 + tap / kw, ix = ix0 + tap % kw;
        const bool inside = pixel < pixels && k < depth && iy >= 0 && iy < h && ix >= 0 && ix < w;
        patches[row][column] = inside ? x[image + ((int64)iy * w + ix) * c + k % c] : storage_t(0);
        weights[row][column] = loaded_output < o && k < depth ? weight[(int64)loaded_output * depth + k] : storage_t(0);
        __syncthreads();
        for (int i = 0; i < TILE; ++i) sum = fma((accumulate_t)patches[row][i], (accumulate_t)weights[column][i], sum);
        __syncthreads();  // nobody still reads the tiles that the next round overwrites
    }
    if (pixel < pixels && output < o) y[pixel * o + output] = sum + (bias ? bias[output] : 0);
}
