// Convolution, the rung `tiled`: implicit GEMM with tiles in shared memory and in registers. Stride 1, any kernel
// size, any padding (SegNet: 3x3 padding 1, SegNet-Basic: 7x7 padding 3, classifiers).
// Element types: float32, float64, bfloat16.
//
// A convolution is a matrix product whose left factor, the image patches, is never written out ("implicit"):
//
//   fprop  y (pixels, o)          = patches (pixels, kh kw c)  x  weight^T (kh kw c, o)
//   dgrad  dx (pixels, c)         = the fprop of dy, padding k - 1 - p, with the weight flipped in ky and kx and its
//                                   two channel dimensions exchanged (conv2d_flip_weight, once per backward):
//                                   dx[iy] = sum_ky dy[iy + p - ky] w[ky] = sum_ky' dy[iy - (k-1-p) + ky'] w[k-1-ky']
//   wgrad  dweight^T (kh kw c, o) = patches^T (kh kw c, pixels) x  dy (pixels, o)
//
// Over conv2d_shared.cu: a block of 128 threads computes a tile of 128 x 64 results, 8 x 8 in the registers of each thread. Every
// value fetched from global memory is used 64 or 128 times, every value fetched from shared memory 8 times.
//
// Threads: thread t loads column t % 16 of the patches' tile (for wgrad row t), so that neighbouring threads read
// neighbouring channels; it computes rows 4 (t / 8) + {0..3, 64..67} and columns 4 (t % 8) + {0..3, 32..35}: the two
// groups of four keep the 16-byte reads of a warp in different shared-memory banks.
// Determinism: each result is one sum in a fixed order; wgrad splits the pixels into chunks that depend on the shape
// alone and adds the chunks' results in their order.
#include "common/types.cuh"

#define TILE_ROWS 128
#define TILE_COLUMNS 64
#define TILE_DEPTH 16
#define THREADS 128
#define PAD 4  // shifts the rows of a tile against each other, so that storing one column meets different banks

typedef storage_t LeftTile[TILE_DEPTH][TILE_ROWS + PAD];
typedef storage_t RightTile[TILE_DEPTH][TILE_COLUMNS + PAD];

struct Results {
    accumulate_t sums[8][8];

    __device__ Results() {
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 8; ++j) sums[i][j] = 0;
    }
    __device__ static int row(int i) { return i / 4 * 64 + threadIdx.x / 8 * 4 + i % 4; }
    __device__ static int column(int j) { return j / 4 * 32 + threadIdx.x % 8 * 4 + j % 4; }

    __device__ void add_product(const LeftTile& left, const RightTile& right) {
        const int row0 = row(0), column0 = column(0);
        for (int k = 0; k < TILE_DEPTH; ++k) {
            accumulate_t a[8], b[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] = left[k][row0 + i];
                a[i + 4] = left[k][row0 + 64 + i];
                b[i] = right[k][column0 + i];
                b[i + 4] = right[k][column0 + 32 + i];
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i][j] = fma(a[i], b[j], sums[i][j]);
        }
    }
};

// Launch: grid ((n * oh * ow + TILE_ROWS - 1) / TILE_ROWS, (o + TILE_COLUMNS - 1) / TILE_COLUMNS), block THREADS
extern "C" __global__ void __launch_bounds__(THREADS) conv2d_forward_tiled(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    SHARED_ARRAY(storage_t, left, [TILE_DEPTH][TILE_ROWS + PAD]);
    SHARED_ARRAY(storage_t, right, [TILE_DEPTH][TILE_COLUMNS + PAD]);
    SHARED_ARRAY(int64, patch_image, [TILE_ROWS]);
    SHARED_ARRAY(int, patch_y, [TILE_ROWS]);
    SHARED_ARRAY(int, patch_x, [TILE_ROWS]);

    const int64 pixels = (int64)n * oh * ow, first_pixel = (int64)blockIdx.x * TILE_ROWS;
    const int first_output = blockIdx.y * TILE_COLUMNS;
    {
        const int64 pixel = first_pixel + threadIdx.x;
        patch_image[threadIdx.x] = pixel / ow / oh * h * w * c;
        // A row past the last pixel lies far above its image: every bounds check below refuses it.
        patch_y[threadIdx.x] = pixel < pixels ? (int)(pixel / ow % oh) - pad_y : -(1 << 30);
        patch_x[threadIdx.x] = (int)(pixel % ow) - pad_x;
    }
    __syncthreads();

    Results results;
    const int depth = kh * kw * c, own_k = threadIdx.x % TILE_DEPTH, own_row = threadIdx.x / TILE_DEPTH;
    for (int first_k = 0; first_k < depth; first_k += TILE_DEPTH) {
        const int k = first_k + own_k, tap = k / c, channel = k - tap * c, ky = tap / kw, kx = tap - ky * kw;
        for (int row = own_row; row < TILE_ROWS; row += THREADS / TILE_DEPTH) {
            const int iy = patch_y[row] + ky, ix = patch_x[row] + kx;
            const bool inside = k < depth && iy >= 0 && iy < h && ix >= 0 && ix < w;
            left[own_k][row] = inside ? x[patch_image[row] + ((int64)iy * w + ix) * c + channel] : storage_t(0);
        }
        for (int column = own_row; column < TILE_COLUMNS; column += THREADS / TILE_DEPTH) {
            const int output = first_output + column;
            right[own_k][column] = k < depth && output < o ? weight[(int64)output * depth + k] : storage_t(0);
        }
        __syncthreads();
        results.add_product(left, right);
        __syncthreads();
    }

    for (int i = 0; i < 8; ++i) {
        const int64 pixel = first_pixel + Results::row(i);
        if (pixel >= pixels) continue;
        for (int j = 0; j < 8; ++j) {
            const int output = first_output + Results::column(j);
            if (output < o) y[pixel * o + output] = results.sums[i][j] + (bias ? bias[output] : 0);
        }
    }
}

// flipped[c, ky, kx, o] = weight[o, kh - 1 - ky, kw - 1 - kx, c]: makes dgrad an fprop.
extern "C" __global__ void conv2d_flip_weight(
    const storage_t* __restrict__ weight,  // (o, kh, kw, c)
    storage_t* __restrict__ flipped,       // (c, kh, kw, o)
    int o, int kh, int kw, int c) {
    const int64 count = (int64)o * kh * kw * c;
    const int taps = kh * kw;
    FOR_EACH_INDEX(i, count) {
        const int output = (int)(i % o), tap = (int)(i / o % taps), channel = (int)(i / o / taps);
        flipped[i] = weight[((int64)output * taps + taps - 1 - tap) * c + channel];
    }
}

// Launch: grid ((kh * kw * c + TILE_ROWS - 1) / TILE_ROWS, (o + TILE_COLUMNS - 1) / TILE_COLUMNS, chunks), block THREADS
extern "C" __global__ void __launch_bounds__(THREADS) conv2d_backward_weight_tiled(
    const storage_t* __restrict__ x,      // (n, h, w, c)
    const storage_t* __restrict__ dy,     // (n, oh, ow, o)
    accumulate_t* __restrict__ partials,  // (chunks, o, kh, kw, c)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int chunks,
    int64 pixels_per_chunk) {
    SHARED_ARRAY(storage_t, left, [TILE_DEPTH][TILE_ROWS + PAD]);
    SHARED_ARRAY(storage_t, right, [TILE_DEPTH][TILE_COLUMNS + PAD]);
    SHARED_ARRAY(int64, patch_image, [TILE_DEPTH]);
    SHARED_ARRAY(int, patch_y, [TILE_DEPTH]);
    SHARED_ARRAY(int, patch_x, [TILE_DEPTH]);

    const int depth = kh * kw * c, first_row = blockIdx.x * TILE_ROWS, first_output = blockIdx.y * TILE_COLUMNS;
    const int64 pixels = (int64)n * oh * ow, first_pixel = blockIdx.z * pixels_per_chunk;
    const int64 end_pixel = first_pixel + pixels_per_chunk < pixels ? first_pixel + pixels_per_chunk : pixels;
    // This thread loads one row of the patches' tile: one channel of one tap.
    const int k = first_row + threadIdx.x, tap = k / c, channel = k - tap * c, ky = tap / kw, kx = tap - ky * kw;

    Results results;
    for (int64 pixel0 = first_pixel; pixel0 < end_pixel; pixel0 += TILE_DEPTH) {
        if (threadIdx.x < TILE_DEPTH) {
            const int64 pixel = pixel0 + threadIdx.x;
            patch_image[threadIdx.x] = pixel / ow / oh * h * w * c;
            patch_y[threadIdx.x] = pixel < end_pixel ? (int)(pixel / ow % oh) - pad_y : -(1 << 30);
            patch_x[threadIdx.x] = (int)(pixel % ow) - pad_x;
        }
        __syncthreads();  // also: everyone has finished with the tiles of the round before
        for (int i = 0; i < TILE_DEPTH; ++i) {
            const int iy = patch_y[i] + ky, ix = patch_x[i] + kx;
            const bool inside = k < depth && iy >= 0 && iy < h && ix >= 0 && ix < w;
            left[i][threadIdx.x] = inside ? x[patch_image[i] + ((int64)iy * w + ix) * c + channel] : storage_t(0);
        }
        for (int i = threadIdx.x; i < TILE_DEPTH * TILE_COLUMNS; i += THREADS) {
            const int64 pixel = pixel0 + i / TILE_COLUMNS;
            const int column = i % TILE_COLUMNS, output = first_output + column;
            right[i / TILE_COLUMNS][column] = pixel < end_pixel && output < o ? dy[pixel * o + output] : storage_t(0);
        }
        __syncthreads();
        results.add_product(left, right);
    }

    accumulate_t* const partial = partials + (int64)blockIdx.z * o * depth;
    for (int j = 0; j < 8; ++j) {
        const int output = first_output + Results::column(j);
        if (output >= o) continue;
        for (int i = 0; i < 8; ++i) {
            const int row = first_row + Results::row(i);
            if (row < depth) partial[(int64)output * depth + row] = results.sums[i][j];
        }
    }
}
