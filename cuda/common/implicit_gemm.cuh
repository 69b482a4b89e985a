// Convolution of stride 1 as a matrix product on tensor cores: the main loops, without what comes before and after.
//
//   fprop  y (pixels, o)          = patches (pixels, kh kw c)  x  weight^T (kh kw c, o)
//   wgrad  dweight^T (kh kw c, o) = patches^T (kh kw c, pixels)  x  dy (pixels, o), the pixels split into chunks
//
// A block of four warps (eight in float32) computes a tile of the product. Both factors pass through shared memory in stages
// of 128 bytes of depth (32 float32 or 64 bfloat16), copied two stages ahead of the arithmetic, so that the latency of
// global memory is hidden. How operands lie in shared memory and reach the registers: warp_tile.cuh.
//
// Patches are copied 16 bytes at a time, so the channels are a multiple of PIECE; others: gathered_gemm.cuh. In fprop the
// pixels come in one of two orders (RowOrder): one after the other, or window by window.
//
// In fprop, thread t copies piece t % 8 of every 16th patch and weight row from t / 8 on; in wgrad, where the contiguous
// dimension is no depth, a fixed piece of every pixel that is its turn.
// Sizes: offsets in the images of one block are 32 bits wide; the plan (ops/convolution/conv2d_mma.py) refuses what does not fit.
#pragma once
#include "async_copy.cuh"
#include "piece.cuh"
#include "warp_tile.cuh"

// A warp's tile is at most 64 x 64 (128 sums per thread), and half of that in float32, which needs registers for parts of sums.
constexpr int THREADS = MULTIPLY == TF32X3 ? 256 : 128;
constexpr int BLOCKS = 2;  // on a multiprocessor: more have no room for their stages, so registers need not be saved for them
constexpr int WIDE_BLOCKS = 256 / THREADS;  // of 128 x 128, and of wgrad
#define STAGES 3

#define SIZES {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x}  // a Convolution of a kernel's parameters
struct Convolution {
    int n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x;
    __device__ int depth() const { return kh * kw * c; }
    __device__ int64 pixels() const { return (int64)n * oh * ow; }
};

// An output pixel. Its image is counted from the first one that the block touches.
struct Pixel {
    int image, y, x;
    bool exists;
};

// The order of the product's rows. With `windows`, rows 4 k ... 4 k + 3 are the positions of the k-th 2x2 window of the
// output: four neighbouring rows of a warp's tile, between whose lanes a shuffle can pool or choose. At an odd edge
// some of them do not exist.
struct RowOrder {
    int h, w;
    bool windows;
    __device__ RowOrder(const Convolution& g, bool by_windows) : h(g.oh), w(g.ow), windows(by_windows) {}
    __device__ int window_rows() const { return (h + 1) / 2; }
    __device__ int window_columns() const { return (w + 1) / 2; }
    __device__ int rows_of_image() const { return windows ? 4 * window_rows() * window_columns() : h * w; }
    // `row` counts from the first row of an image.
    __device__ Pixel at(int row, bool exists) const {
        const int image = row / rows_of_image(), within = row - image * rows_of_image();
        if (!windows) return {image, within / w, within % w, exists};
        const int window = within / 4;
        const int y = window / window_columns() * 2 + (within >> 1 & 1), x = window % window_columns() * 2 + (within & 1);
        return {image, y, x, exists && y < h && x < w};
    }
};

// Where the patch of an output pixel begins, in terms of its source, and which taps of it lie inside the image: bit ky
// for a row of taps, bit 16 + kx for a column. A pixel that does not exist has none.
struct Patch {
    int offset;
    unsigned taps;

    // A bit for each of the positions start, start + 1, ... of `count` taps that is at least 0 and less than `size`.
    __device__ static unsigned taps_inside(int start, int size, int count) {
        const int first = min(max(-start, 0), count), end = max(min(size - start, count), first);
        return (1u << end) - (1u << first);
    }
    __device__ bool inside(unsigned tap) const { return !(tap & ~taps); }
};

// One position of the depth kh kw c. Beyond its end ky is kh, which no patch has.
struct Tap {
    int ky, kx, channel;
    __device__ Tap(const Convolution& g, int k) {
        const int tap = k / g.c;
        channel = k - tap * g.c;
        ky = min(tap / g.kw, g.kh);
        kx = tap % g.kw;
    }
    __device__ void advance(const Convolution& g, int by) {
        channel += by;
        while (channel >= g.c && ky < g.kh) {
            channel -= g.c;
            if (++kx == g.kw) {
                kx = 0;
                ++ky;
            }
        }
    }
    __device__ unsigned bits() const { return 1u << ky | 1u << (16 + kx); }  // of Patch::taps
    __device__ int offset(const Convolution& g) const { return (ky * g.w + kx) * g.c + channel; }  // from Patch::offset on
};

__device__ inline void copy_piece(char* to, const storage_t* from, const storage_t* array, bool inside) {
    cp_async_16(to, inside ? from : array, inside ? PIECE_BYTES : 0);
}

__device__ inline Patch patch_of(const Convolution& g, const Pixel& pixel) {
    const int y = pixel.y - g.pad_y, x = pixel.x - g.pad_x;
    const unsigned rows = Patch::taps_inside(y, g.h, g.kh), columns = Patch::taps_inside(x, g.w, g.kw);
    return {((pixel.image * g.h + y) * g.w + x) * g.c, pixel.exists ? rows | columns << 16 : 0};
}

// The pipeline: STAGES - 1 stages are in flight while one is multiplied. `begin(i, stage)` starts the copies of the i-th
// part of the depth, `multiply(stage)` adds a stage's product.
template <class Begin, class Multiply>
__device__ void run_pipeline(int parts, Begin begin, Multiply multiply) {
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < parts) begin(i, i);
        cp_async_commit();
    }
    int stage = 0, next = STAGES - 1;
    for (int i = 0; i < parts; ++i) {
        cp_async_wait_group<STAGES - 2>();
        __syncthreads();  // the stage is complete, and everyone has finished with the one before, which `next` overwrites
        if (i + STAGES - 1 < parts) begin(i + STAGES - 1, next);
        cp_async_commit();  // also of nothing: the wait counts groups
        multiply(stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
}

// How the tile of a block is dealt to its warps.
template <int ROWS_, int COLUMNS_, int THREADS_ = THREADS, int MOST_ACROSS = THREADS_ / 64>
struct BlockTile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, THREADS_OF_BLOCK = THREADS_;
    static constexpr int WARPS_ACROSS = COLUMNS / 32 < MOST_ACROSS ? COLUMNS / 32 : MOST_ACROSS;
    static constexpr int WARPS_DOWN = THREADS_ / WARP / WARPS_ACROSS;
    static constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
    static constexpr int STAGE_BYTES = (ROWS + COLUMNS) * DEPTH_BYTES, SHARED = STAGES * STAGE_BYTES;
    static constexpr bool GATHERED = false;  // gathered_gemm.cuh
    static constexpr int KEPT = 0;           // bytes of shared memory that the epilogue leaves alone
    typedef WarpTile<WARP_ROWS, WARP_COLUMNS> Tile;
    // Where the part of this thread's warp begins.
    __device__ static int row0() { return warp_index() % WARPS_DOWN * WARP_ROWS; }
    __device__ static int column0() { return warp_index() / WARPS_DOWN * WARP_COLUMNS; }
};

struct ForwardOperands {
    typedef DepthContiguous Left, Right;
    static constexpr bool MOVED = false;
};

// The product of fprop: rows are pixels from blockIdx.x * ROWS on, columns outputs from blockIdx.y * COLUMNS on. Of the
// depth, the stages from `first_part` on, at most `most_parts`.
template <class Block>
__device__ void block_multiply_forward(typename Block::Tile& tile, const storage_t* __restrict__ x,
                                       const storage_t* __restrict__ weight, const Convolution& g,
                                       const RowOrder& order, int first_part = 0, int most_parts = 1 << 30) {
    SHARED_DYNAMIC(char, stages);
    SHARED_ARRAY(Patch, patches, [Block::ROWS]);
    constexpr int ACROSS = DEPTH / PIECE, LANES = THREADS / ACROSS;  // a thread copies a piece of every LANES-th row

    const int64 first_row = (int64)blockIdx.x * Block::ROWS, rows = (int64)g.n * order.rows_of_image();
    const int first_image = (int)(first_row / order.rows_of_image());
    const int first_output = blockIdx.y * Block::COLUMNS, depth = g.depth();
    for (int row = threadIdx.x; row < Block::ROWS; row += THREADS) {
        const int within = (int)(first_row - (int64)first_image * order.rows_of_image()) + row;
        patches[row] = patch_of(g, order.at(within, first_row + row < rows));
    }
    __syncthreads();

    const storage_t* const images = x + (int64)first_image * g.h * g.w * g.c;
    const int piece = threadIdx.x % ACROSS, lane = threadIdx.x / ACROSS;
    int k = first_part * DEPTH + piece * PIECE;
    Tap tap(g, k);
    auto begin = [&](int, int stage) {
        char* const left = stages + stage * Block::STAGE_BYTES;
        const storage_t* const shifted = images + tap.offset(g);
        const unsigned bits = tap.bits();
#pragma unroll
        for (int row = lane; row < Block::ROWS; row += LANES) {
            const Patch patch = patches[row];
            copy_piece(left + DepthContiguous::offset(row, piece), shifted + patch.offset, x, patch.inside(bits));
        }
        char* const right = left + Block::ROWS * DEPTH_BYTES;
#pragma unroll
        for (int column = lane; column < Block::COLUMNS; column += LANES) {
            const int output = first_output + column;
            copy_piece(right + DepthContiguous::offset(column, piece), weight + (int64)output * depth + k, weight,
                       k < depth && output < g.o);
        }
        k += DEPTH;
        tap.advance(g, DEPTH);
    };
    run_pipeline(min((depth + DEPTH - 1) / DEPTH - first_part, most_parts), begin, [&](int stage) {
        const char* const operands = stages + stage * Block::STAGE_BYTES;
        add_stage<ForwardOperands>(tile, operands, operands + Block::ROWS * DEPTH_BYTES, Block::row0(), Block::column0());
    });
}

template <class Block>
struct WeightOperands {
    typedef DepthDown<Block::ROWS, Block::WARP_ROWS> Left;
    typedef DepthDown<Block::COLUMNS, Block::WARP_COLUMNS> Right;
    static constexpr bool MOVED = true;
};

// The pixels of chunk blockIdx.z.
struct WeightChunk {
    int64 first_pixel;
    int count, first_image, first;  // first: its first pixel, counted from the first image that it touches
    __device__ WeightChunk(const Convolution& g, int64 pixels_per_chunk) : first_pixel(blockIdx.z * pixels_per_chunk) {
        count = (int)min(pixels_per_chunk, g.pixels() - first_pixel);
        first_image = (int)(first_pixel / (g.oh * g.ow));
        first = (int)(first_pixel - (int64)first_image * (g.oh * g.ow));
    }
    __device__ int parts() const { return (count + DEPTH - 1) / DEPTH; }
    __device__ Patch patch(const Convolution& g, int pixel) const {
        return patch_of(g, RowOrder(g, false).at(first + min(pixel, count - 1), pixel < count));
    }
};

// wgrad of a chunk: rows are positions of kh kw c, columns outputs, the depth is pixels.
template <class Block>
__device__ void block_backward_weight(const storage_t* __restrict__ x, const storage_t* __restrict__ dy,
                                      accumulate_t* __restrict__ partials, const Convolution& g, int64 pixels_per_chunk) {
    constexpr int ROWS = Block::ROWS, COLUMNS = Block::COLUMNS;
    typedef typename WeightOperands<Block>::Left Left;
    typedef typename WeightOperands<Block>::Right Right;
    SHARED_DYNAMIC(char, stages);
    SHARED_ARRAY(Patch, patches, [STAGES][DEPTH]);  // of the pixels of a part of the depth, a part ahead of the copies
    // Of every LANES-th pixel this thread copies one piece of the patches, another of dy.
    constexpr int LEFT_LANES = THREADS * PIECE / ROWS, RIGHT_LANES = THREADS * PIECE / COLUMNS;

    const WeightChunk chunk(g, pixels_per_chunk);
    const int depth = g.depth(), first_row = blockIdx.x * ROWS, first_output = blockIdx.y * COLUMNS;
    auto find_patches = [&](int part, int slot) {
        for (int i = threadIdx.x; i < DEPTH; i += THREADS) patches[slot][i] = chunk.patch(g, part * DEPTH + i);
    };
#pragma unroll
    for (int part = 0; part < STAGES; ++part) find_patches(part, part);
    __syncthreads();

    const int left_number = threadIdx.x * PIECE % ROWS, right_number = threadIdx.x * PIECE % COLUMNS;
    const int output = first_output + right_number;
    const Tap tap(g, first_row + left_number);
    const unsigned bits = tap.bits();
    const storage_t* const shifted = x + (int64)chunk.first_image * g.h * g.w * g.c + tap.offset(g);
    const storage_t* const gradients = dy + chunk.first_pixel * g.o + output;
    auto begin = [&](int part, int stage) {
        char* const left = stages + stage * Block::STAGE_BYTES;
#pragma unroll
        for (int i = threadIdx.x * PIECE / ROWS; i < DEPTH; i += LEFT_LANES) {
            const Patch patch = patches[stage][i];
            copy_piece(left + Left::offset(i, left_number / PIECE), shifted + patch.offset, x, patch.inside(bits));
        }
        char* const right = left + ROWS * DEPTH_BYTES;
#pragma unroll
        for (int i = threadIdx.x * PIECE / COLUMNS; i < DEPTH; i += RIGHT_LANES) {
            const int pixel = part * DEPTH + i;
            copy_piece(right + Right::offset(i, right_number / PIECE), gradients + (int64)pixel * g.o, dy,
                       pixel < chunk.count && output < g.o);
        }
        // Into the slot that was read STAGES - 1 parts and at least a barrier ago; it is read next after another barrier.
        if (part + 1 >= STAGES) find_patches(part + 1, stage + 1 == STAGES ? 0 : stage + 1);
    };
    typename Block::Tile tile;
    run_pipeline(chunk.parts(), begin, [&](int stage) {
        const char* const operands = stages + stage * Block::STAGE_BYTES;
        add_stage<WeightOperands<Block>>(tile, operands, operands + ROWS * DEPTH_BYTES, Block::row0(), Block::column0());
    });

    constexpr int M = Block::Tile::M, N = Block::Tile::N;
#pragma unroll
    for (int k = 0; k < 2 * N; ++k) {
        const int n = k / 2, j = k % 2, column = first_output + Block::column0() + Right::template column<N>(n, j);
        if (column >= g.o) continue;
        accumulate_t* const partial = partials + ((int64)blockIdx.z * g.o + column) * depth;
        auto sum = [&](int m, int i) { return tile.sums[m][n][2 * i + j]; };
        auto row = [&](int m, int i) { return first_row + Block::row0() + Left::template row<M>(m, 2 * i); };
#pragma unroll
        for (int m = 0; m < M; m += 2)
            if constexpr (Left::ADJACENT) {
                const Values four = {{sum(m, 0), sum(m, 1), sum(m + 1, 0), sum(m + 1, 1)}};
                if (row(m, 0) < depth) store_piece((storage_t*)partial + row(m, 0), piece_of(four));
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (row(m + i / 2, i % 2) < depth) partial[row(m + i / 2, i % 2)] = sum(m + i / 2, i % 2);
            }
    }
}
