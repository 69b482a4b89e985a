// Convolution, a rung that teaches: tiles in registers, 16-byte copies, two stages in flight. Stride 1, c a multiple of 4.
// Element types: float32; sm_80 and newer.
//
//   fprop  y (pixels, o) = patches (pixels, kh kw c)  x  weight^T (kh kw c, o)
//
// Over conv2d_tiled.cu (same tile: 128 x 64 results, 8 x 8 per thread, depth 16): while the threads multiply one stage, the
// next is on its way (cp.async, "double buffering"), so that the latency of global memory passes behind arithmetic. A copy
// moves 4 channels at once and never touches a register. What is left undone: the arithmetic is that of ordinary cores,
// 2 operations per instruction and thread (conv2d_mma_plain.cu: tensor cores).
//
// Threads: t copies depths 4 (t % 4) ... + 3 of rows t / 4 + 32 i. It computes pixels t / 8 + 16 i and outputs t % 8 + 8 j.
// Shared memory: rows of 16 numbers lie 20 apart. Eight rows then begin at banks 0, 20, 8, 28, 16, 4, 24, 12: a 16-byte
// read of one depth by all threads of a warp meets no bank twice.
// Determinism: each result is one sum in the order of the depth.
#include "common/async_copy.cuh"

#define ROWS 128
#define COLUMNS 64
#define DEPTH 16
#define STRIDE 20
#define THREADS 128

// Launch: grid ((n * oh * ow + ROWS - 1) / ROWS, (o + COLUMNS - 1) / COLUMNS), block THREADS
extern "C" __global__ void __launch_bounds__(THREADS) conv2d_forward_pipelined(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    SHARED_ARRAY(storage_t, patches, [2][ROWS][STRIDE]);
    SHARED_ARRAY(storage_t, weights, [2][COLUMNS][STRIDE]);

    const int depth = kh * kw * c, stages = (depth + DEPTH - 1) / DEPTH;
    const int64 pixels = (int64)n * oh * ow, first_pixel = (int64)blockIdx.x * ROWS;
    const int first_output = blockIdx.y * COLUMNS, piece = threadIdx.x % 4 * 4, copied_row = threadIdx.x / 4;

    int64 image[ROWS / 32];  // of the pixels that this thread copies: where their image begins, and their first tap
    int iy0[ROWS / 32], ix0[ROWS / 32];
#pragma unroll
    for (int i = 0; i < ROWS / 32; ++i) {
        const int64 pixel = first_pixel + copied_row + 32 * i;
        image[i] = pixel / ow / oh * h * w * c;
        iy0[i] =
            pixel < pixels ? (int)(pixel / ow % oh) - pad_y : -(1 << 30);  // beyond the last pixel: above any image
        ix0[i] = (int)(pixel % ow) - pad_x;
    }

    // Begins the copies of a stage; what lies outside of the image or beyond the depth becomes zeros.
    auto fetch = [&](int stage) {
        const int k = stage * DEPTH + piece, tap = k / c, ky = tap / kw, kx = tap % kw, buffer = stage % 2;
#pragma unroll
        for (int i = 0; i < ROWS / 32; ++i) {
            const int iy = iy0[i] + ky, ix = ix0[i] + kx;
            const bool inside = k < depth && iy >= 0 && iy < h && ix >= 0 && ix < w;
            const storage_t* const from = inside ? x + image[i] + ((int64)iy * w + ix) * c + k % c : x;
            cp_async_16(&patches[buffer][copied_row + 32 * i][piece], from, inside ? 16 : 0);
        }
#pragma unroll
        for (int i = 0; i < COLUMNS / 32; ++i) {
            const int output = first_output + copied_row + 32 * i;
            const bool inside = k < depth && output < o;
            const storage_t* const from = inside ? weight + (int64)output * depth + k : weight;
            cp_async_16(&weights[buffer][copied_row + 32 * i][piece], from, inside ? 16 : 0);
        }
    };

    const int row0 = threadIdx.x / 8, column0 = threadIdx.x % 8;
    accumulate_t sums[8][8] = {};
    fetch(0);
    cp_async_commit();
    for (int stage = 0; stage < stages; ++stage) {
        if (stage + 1 < stages) fetch(stage + 1);
        cp_async_commit();         // an empty group at the end, so that "all but one" always means this stage
        cp_async_wait_group<1>();  // this thread's copies of the stage have arrived ...
        __syncthreads();           // ... and everybody's
        for (int k = 0; k < DEPTH; k += 4) {
            storage_t a[8][4], b[8][4];
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int d = 0; d < 4; ++d) {
                    a[i][d] = patches[stage % 2][row0 + 16 * i][k + d];
                    b[i][d] = weights[stage % 2][column0 + 8 * i][k + d];
                }
#pragma unroll
            for (int d = 0; d < 4; ++d)
#pragma unroll
                for (int i = 0; i < 8; ++i)
#pragma unroll
                    for (int j = 0; j < 8; ++j) sums[i][j] = fma(a[i][d], b[j][d], sums[i][j]);
        }
        __syncthreads();  // nobody still reads the buffer that the next round fills
    }

#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int output = first_output + column0 + 8 * j;
        if (output >= o) continue;
        const accumulate_t shift = bias ? bias[output] : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64 pixel = first_pixel + row0 + 16 * i;
            if (pixel < pixels) y[pixel * o + output] = sums[i][j] + shift;
        }
    }
}
