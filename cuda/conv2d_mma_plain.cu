// Convolution, a rung that teaches: tensor cores, and nothing else. Stride 1, c a multiple of 8.
// Element types: bfloat16; sm_80 and newer.
//
//   fprop  y (pixels, o) = patches (pixels, kh kw c)  x  weight^T (kh kw c, o)
//
// Over conv2d_pipelined.cu: a warp multiplies 16 pixels x 16 depths with 16 depths x 8 outputs in one instruction, 4,096
// operations where 32 threads made 64. The operands of the instruction are fragments: which thread holds which numbers is
// prescribed (common/mma.cuh has the table). Loads are the simplest that give them, one 32-bit word per register, and
// nothing overlaps. What is left undone, and what conv2d_mma.cu adds: ldmatrix (a quarter of the load instructions),
// swizzled rows instead of padded ones, several stages of cp.async, larger tiles.
//
// Threads: a block of four warps computes 64 x 64 results; warp w those of rows 32 (w / 2) and columns 32 (w % 2), as 2 x 4
// products of 16 x 8. Rows of 32 numbers lie 40 apart (20 words): the 8 rows x 4 words that a fragment's load touches
// meet all 32 banks once.
// Worked index: lane 13 is g = 13 / 4 = 3, t = 13 % 4 = 1. Its a[2] of the first product holds row 3, depths 10 and 11.
// Determinism: each result is one sum in the order of the depth; how the 16 terms of one instruction are added is the
// tensor core's affair.
#include "common/mma.cuh"
#include "common/piece.cuh"

#define TILE 64
#define DEPTH 32
#define STRIDE 40
#define THREADS 128

// Two neighbouring numbers of a row, as a register of a fragment holds them.
__device__ inline unsigned pair(const storage_t* numbers) { return *(const unsigned*)numbers; }

// Launch: grid ((n * oh * ow + TILE - 1) / TILE, (o + TILE - 1) / TILE), block THREADS
extern "C" __global__ void __launch_bounds__(THREADS, 4) conv2d_forward_mma_plain(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    SHARED_ARRAY(storage_t, patches, [TILE][STRIDE]);
    SHARED_ARRAY(storage_t, weights, [TILE][STRIDE]);

    const int depth = kh * kw * c, first_output = blockIdx.y * TILE;
    const int64 pixels = (int64)n * oh * ow, first_pixel = (int64)blockIdx.x * TILE;
    const int g = warp_lane() / 4, t = warp_lane() % 4, row0 = warp_index() / 2 * 32, column0 = warp_index() % 2 * 32;

    float sums[2][4][4] = {};  // products down, products across, the four results of a thread in each
    for (int first = 0; first < depth; first += DEPTH) {
        // Each thread brings two pieces of 8 numbers of each factor, one after the other: both at once cost registers.
#pragma unroll 1
        for (int i = threadIdx.x; i < TILE * DEPTH / 8; i += THREADS) {
            const int row = i / (DEPTH / 8), column = i % (DEPTH / 8) * 8;
            const int k = first + column, tap = k / c, output = first_output + row;
            const int64 pixel = first_pixel + row;
            const int iy = (int)(pixel / ow % oh) - pad_y + tap / kw, ix = (int)(pixel % ow) - pad_x + tap % kw;
            const bool inside = pixel < pixels && k < depth && iy >= 0 && iy < h && ix >= 0 && ix < w;
            const Piece zeros = {};
            *(Piece*)&patches[row][column] =
                inside ? load_piece(x + (pixel / ow / oh * h * w + (int64)iy * w + ix) * c + k % c) : zeros;
            *(Piece*)&weights[row][column] =
                k < depth && output < o ? load_piece(weight + (int64)output * depth + k) : zeros;
        }
        __syncthreads();
        for (int k = 0; k < DEPTH; k += 16) {
            unsigned b[4][2];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                b[j][0] = pair(&weights[column0 + 8 * j + g][k + 2 * t]);
                b[j][1] = pair(&weights[column0 + 8 * j + g][k + 2 * t + 8]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = row0 + 16 * i + g;
                const unsigned a[4] = {
                    pair(&patches[row][k + 2 * t]), pair(&patches[row + 8][k + 2 * t]),
                    pair(&patches[row][k + 2 * t + 8]), pair(&patches[row + 8][k + 2 * t + 8])};
                mma_m16n8k16_bf16(sums[i], a, b);
            }
        }
        __syncthreads();
    }

    // Unrolled, or the sums would be indexed at run time and so lie in memory.
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int64 pixel = first_pixel + row0 + 16 * i + g + r / 2 * 8;
                const int output = first_output + column0 + 8 * j + 2 * t + r % 2;
                if (pixel < pixels && output < o) y[pixel * o + output] = sums[i][j][r] + (bias ? bias[output] : 0);
            }
}
