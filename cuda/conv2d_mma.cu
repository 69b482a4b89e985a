// Convolution, the rungs `tf32`, `tf32x3` and `bf16`: the implicit GEMM of conv2d_tiled.cu on tensor cores. Stride 1, kernels
// up to 15x15.
// Element types: tf32, tf32x3, bf16; sm_80 and newer.
//
//   fprop  y       = patches x weight^T + bias
//   dgrad  dx      = the fprop of dy with the flipped weight (conv2d_flip_weight)
//   wgrad  dweight = the sum of partial results, which conv2d_backward_weight_merge adds in their order
//
// Over conv2d_tiled.cu: a warp multiplies 16 x 8 x (32 bytes of depth) in one instruction; copies from global to shared memory
// are asynchronous, 16 bytes each. The main loops, their shapes and thread mapping: common/implicit_gemm.cuh. This file
// writes their results. For channels that are no multiple of a piece (3 of an image, 21 of a classifier) there are kernels
// named "elements": common/gathered_gemm.cuh.
//
// Determinism: each result is one sum in a fixed order. Between GPUs of different generations the order inside an
// instruction may differ.
#include "common/gathered_gemm.cuh"

// y[pixel, output] = sum + bias[output] of a warp's tile. A thread holds pairs of neighbouring outputs, the four threads
// of a row 8 of them: with PAIRS (o even, so that pairs are aligned and never cut) they write whole sectors of 32 bytes.
template <bool PAIRS, int ROWS, int COLUMNS>
__device__ void store_tile(const WarpTile<ROWS, COLUMNS>& tile, storage_t* __restrict__ y,
                           const accumulate_t* __restrict__ bias, int64 pixel0, int64 pixels, int output0, int o) {
    typedef WarpTile<ROWS, COLUMNS> Tile;
    accumulate_t shift[Tile::N][2];
#pragma unroll
    for (int i = 0; i < 2 * Tile::N; ++i) {
        const int output = output0 + Tile::column(i / 2, i % 2);
        shift[i / 2][i % 2] = bias && output < o ? bias[output] : 0;
    }
#pragma unroll
    for (int i = 0; i < 2 * Tile::M; ++i) {
        const int m = i / 2, first = i % 2 * 2;
        const int64 pixel = pixel0 + Tile::row(m, first);
        if (pixel >= pixels) continue;
        storage_t* const row = y + pixel * o + output0 + Tile::column(0, 0);
#pragma unroll
        for (int n = 0; n < Tile::N; ++n) {
            const int rest = o - output0 - Tile::column(n, 0);  // outputs from here on
            const accumulate_t sums[2] = {tile.sums[m][n][first] + shift[n][0], tile.sums[m][n][first + 1] + shift[n][1]};
            if (PAIRS) {
                if (rest > 0) *(Two<storage_t>*)(row + 8 * n) = {storage_t(sums[0]), storage_t(sums[1])};
            } else {
                if (rest > 0) row[8 * n] = sums[0];
                if (rest > 1) row[8 * n + 1] = sums[1];
            }
        }
    }
}

template <class Block>
__device__ void forward(const storage_t* __restrict__ x, const storage_t* __restrict__ weight,
                        const accumulate_t* __restrict__ bias, storage_t* __restrict__ y, const Convolution& g) {
    const RowOrder order(g, false);
    typename Block::Tile tile;
    if constexpr (Block::GATHERED) {
        const int64 first_row = (int64)blockIdx.x * Block::ROWS;
        block_gather_forward<Block>(tile, x, weight, g, order, RowWalk(order, first_row, 0), first_row + threadIdx.x < g.pixels(), false);
    } else
        block_multiply_forward<Block>(tile, x, weight, g, order);
    const int64 pixel0 = (int64)blockIdx.x * Block::ROWS + Block::row0();
    const int output0 = blockIdx.y * Block::COLUMNS + Block::column0();
    if (g.o % 2 == 0)
        store_tile<true>(tile, y, bias, pixel0, g.pixels(), output0, g.o);
    else
        store_tile<false>(tile, y, bias, pixel0, g.pixels(), output0, g.o);
}

// What the kernels of fprop take.
#define FPROP_PARAMETERS                                                  \
    const storage_t* __restrict__ x,                 /* (n, h, w, c) */   \
    const storage_t* __restrict__ weight,            /* (o, kh, kw, c) */ \
    const accumulate_t* __restrict__ OPTIONAL bias,  /* (o) */            \
    storage_t* __restrict__ y,                       /* (n, oh, ow, o) */ \
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x

// Launch: by ops/convolution/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, WIDE_BLOCKS) conv2d_forward_mma_128x128(FPROP_PARAMETERS) {
    forward<BlockTile<128, 128>>(x, weight, bias, y, SIZES);
}

// Launch: by ops/convolution/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_forward_mma_128x64(FPROP_PARAMETERS) {
    forward<BlockTile<128, 64>>(x, weight, bias, y, SIZES);
}

// Launch: by ops/convolution/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_forward_mma_128x32(FPROP_PARAMETERS) {
    forward<BlockTile<128, 32>>(x, weight, bias, y, SIZES);
}

// Launch: by ops/convolution/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS) conv2d_forward_mma_elements(FPROP_PARAMETERS) {
    forward<GatherTile<128, 64>>(x, weight, bias, y, SIZES);
}

// What the kernels of wgrad take.
#define WGRAD_PARAMETERS                                                                                 \
    const storage_t* __restrict__ x,      /* (n, h, w, c) */                                             \
    const storage_t* __restrict__ dy,     /* (n, oh, ow, o) */                                           \
    accumulate_t* __restrict__ partials,  /* (chunks, o, kh, kw, c) */                                   \
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int chunks, \
    int64 pixels_per_chunk

// Launch: by ops/convolution/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, WIDE_BLOCKS) conv2d_backward_weight_mma_128x128(WGRAD_PARAMETERS) {
    block_backward_weight<BlockTile<128, 128>>(x, dy, partials, SIZES, pixels_per_chunk);
}

// Launch: by ops/convolution/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, WIDE_BLOCKS) conv2d_backward_weight_mma_128x64(WGRAD_PARAMETERS) {
    block_backward_weight<BlockTile<128, 64>>(x, dy, partials, SIZES, pixels_per_chunk);
}

// Launch: by ops/convolution/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(GATHER_THREADS, GATHER_WEIGHT_BLOCKS) conv2d_backward_weight_mma_elements(WGRAD_PARAMETERS) {
    block_gather_backward_weight<GatherTile<32, 64>>(x, dy, partials, SIZES, pixels_per_chunk);
}
