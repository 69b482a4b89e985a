// Convolution, rung 3 of the ladder: the implicit GEMM of conv2d_tiled.cu on tensor cores. Stride 1, kernels up to 15x15.
// Element types: tf32, tf32x3, bf16; sm_80 and newer.
//
//   fprop  y (pixels, o)          = patches (pixels, kh kw c)  x  weight^T (kh kw c, o)
//   dgrad  dx                     = the fprop of dy with the flipped weight (conv2d_flip_weight)
//   wgrad  dweight^T (kh kw c, o) = patches^T (kh kw c, pixels)  x  dy (pixels, o), the pixels split into chunks whose
//                                   results conv2d_backward_weight_merge adds in their order
//
// Over rung 2: a warp multiplies 16 x 8 x (32 bytes of depth) in one instruction. Copies from global to shared memory
// are asynchronous, 16 bytes each, two stages ahead of the arithmetic, so their latency is hidden; a stage is 128 bytes
// of depth (32 float32 or 64 bfloat16). How operands lie in shared memory and reach the registers: common/warp_tile.cuh.
//
// A piece of 16 bytes lies in one tap where the channels are a multiple of PIECE (4 float32, 8 bfloat16). For other
// channels (3 of an image, 21 of a classifier) the kernels named "elements" copy number by number.
//
// Threads: 128, four warps. In fprop, thread t copies piece t % 8 of every 16th patch and weight row from t / 8 on; in
// wgrad, where the contiguous dimension is no depth, a fixed piece of every pixel that is its turn.
// Determinism: each result is one sum in a fixed order. Between GPUs of different generations the order inside an
// instruction may differ.
// Sizes: offsets in the images of one block are 32 bits wide; the plan (ops/conv2d_mma.py) refuses what does not fit.
#include "common/async_copy.cuh"
#include "common/warp_tile.cuh"

#define THREADS 128
#define STAGES 3
#define BLOCKS 2  // on a multiprocessor: more have no room for their stages, so registers need not be saved for them

struct Convolution {
    int n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x;
    __device__ int depth() const { return kh * kw * c; }
    __device__ int64 pixels() const { return (int64)n * oh * ow; }
};

// Where the patch of an output pixel begins, relative to the image of the block's first pixel, and which taps of it lie
// inside the image: bit ky for a row of taps, bit 16 + kx for a column. A pixel beyond the last has none.
struct Patch {
    int offset;
    unsigned taps;

    // `pixel` counts from the first pixel of an image.
    __device__ static Patch of(const Convolution& g, int pixel, bool exists) {
        const int image = pixel / (g.oh * g.ow), within = pixel - image * (g.oh * g.ow);
        const int y = within / g.ow - g.pad_y, x = within % g.ow - g.pad_x;
        const unsigned rows = taps_inside(y, g.h, g.kh), columns = taps_inside(x, g.w, g.kw);
        return {((image * g.h + y) * g.w + x) * g.c, exists ? rows | columns << 16 : 0};
    }
    // A bit for each of the positions start, start + 1, ... of `count` taps that is at least 0 and less than `size`.
    __device__ static unsigned taps_inside(int start, int size, int count) {
        const int first = min(max(-start, 0), count), end = max(min(size - start, count), first);
        return (1u << end) - (1u << first);
    }
    __device__ bool inside(unsigned tap) const { return (taps & tap) == tap; }
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
    __device__ int offset(const Convolution& g) const { return (ky * g.w + kx) * g.c + channel; }
    __device__ unsigned bits() const { return 1u << ky | 1u << (16 + kx); }  // of Patch::taps
};

__device__ inline void copy_piece(char* to, const storage_t* from, const storage_t* array, bool inside) {
    cp_async_16(to, inside ? from : array, inside ? PIECE_BYTES : 0);
}

// Two bytes are too few for an asynchronous copy: bfloat16 passes by a register. What a stage receives early is safe,
// since nobody reads it before the barrier after its wait.
__device__ inline void copy_element(char* to, const storage_t* from, const storage_t* array, bool inside) {
    if constexpr (sizeof(storage_t) == 4)
        cp_async_4(to, inside ? from : array, inside ? 4 : 0);
    else
        *(storage_t*)to = inside ? *from : storage_t(0);
}

// The pipeline: STAGES - 1 stages are under way while one is multiplied. `copy(i, stage)` begins the copies of the i-th
// part of the depth, `multiply(stage)` adds its product.
template <class Copy, class Multiply>
__device__ void run_pipeline(int parts, Copy copy, Multiply multiply) {
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < parts) copy(i, i);
        cp_async_commit();
    }
    int stage = 0, next = STAGES - 1;
    for (int i = 0; i < parts; ++i) {
        cp_async_wait_group<STAGES - 2>();
        __syncthreads();  // the stage is complete, and everyone has finished with the one before, which `next` overwrites
        if (i + STAGES - 1 < parts) copy(i + STAGES - 1, next);
        cp_async_commit();  // also of nothing: the wait counts groups
        multiply(stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
}

struct __align__(2 * sizeof(storage_t)) Pair {
    storage_t first, second;
};

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
            const int left = o - output0 - Tile::column(n, 0);  // outputs from here on
            const accumulate_t sums[2] = {tile.sums[m][n][first] + shift[n][0], tile.sums[m][n][first + 1] + shift[n][1]};
            if (PAIRS) {
                if (left > 0) *(Pair*)(row + 8 * n) = {storage_t(sums[0]), storage_t(sums[1])};
            } else {
                if (left > 0) row[8 * n] = sums[0];
                if (left > 1) row[8 * n + 1] = sums[1];
            }
        }
    }
}

struct ForwardOperands {
    typedef DepthContiguous Left, Right;
};

template <int ROWS, int COLUMNS, int WARPS_DOWN, bool PIECES>
__device__ void forward(const storage_t* __restrict__ x, const storage_t* __restrict__ weight,
                        const accumulate_t* __restrict__ bias, storage_t* __restrict__ y, const Convolution& g) {
    constexpr int WARPS_ACROSS = THREADS / WARP / WARPS_DOWN;
    constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
    constexpr int STAGE_BYTES = (ROWS + COLUMNS) * DEPTH_BYTES;
    SHARED_DYNAMIC(char, stages);
    SHARED_ARRAY(Patch, patches, [ROWS]);

    const int64 first_pixel = (int64)blockIdx.x * ROWS, pixels = g.pixels(), first_image = first_pixel / (g.oh * g.ow);
    const int first_channel = blockIdx.y * COLUMNS, depth = g.depth();
    const storage_t* const images = x + first_image * g.h * g.w * g.c;
    for (int row = threadIdx.x; row < ROWS; row += THREADS) {
        const int pixel = (int)(first_pixel - first_image * (g.oh * g.ow)) + row;
        patches[row] = Patch::of(g, pixel, first_pixel + row < pixels);
    }
    __syncthreads();

    // What this thread copies: a piece, or one number, of every LANES-th row.
    constexpr int ACROSS = PIECES ? DEPTH / PIECE : DEPTH, LANES = THREADS / ACROSS;
    constexpr int UNROLL = PIECES ? ROWS / LANES : 4;
    const int part = threadIdx.x % ACROSS, lane = threadIdx.x / ACROSS;
    int k = PIECES ? part * PIECE : part;
    const int piece = k / PIECE, within = k % PIECE * (int)sizeof(storage_t);
    Tap tap(g, k);
    auto copy = [&](int, int stage) {
        char* const left = stages + stage * STAGE_BYTES;
        char* const right = left + ROWS * DEPTH_BYTES;
        const storage_t* const shifted = images + tap.offset(g);
        const unsigned bits = tap.bits();
#pragma unroll UNROLL
        for (int i = 0; i < ROWS / LANES; ++i) {
            const int row = lane + i * LANES;
            const Patch patch = patches[row];
            char* const to = left + DepthContiguous::offset(row, piece) + within;
            if constexpr (PIECES)
                copy_piece(to, shifted + patch.offset, x, patch.inside(bits));
            else
                copy_element(to, shifted + patch.offset, x, patch.inside(bits));
        }
#pragma unroll UNROLL
        for (int i = 0; i < COLUMNS / LANES; ++i) {
            const int column = lane + i * LANES, output = first_channel + column;
            char* const to = right + DepthContiguous::offset(column, piece) + within;
            if constexpr (PIECES)
                copy_piece(to, weight + (int64)output * depth + k, weight, k < depth && output < g.o);
            else
                copy_element(to, weight + (int64)output * depth + k, weight, k < depth && output < g.o);
        }
        k += DEPTH;
        tap.advance(g, DEPTH);
    };

    const int row0 = warp_index() % WARPS_DOWN * WARP_ROWS, column0 = warp_index() / WARPS_DOWN * WARP_COLUMNS;
    WarpTile<WARP_ROWS, WARP_COLUMNS> tile;
    run_pipeline((depth + DEPTH - 1) / DEPTH, copy, [&](int stage) {
        const char* const left = stages + stage * STAGE_BYTES;
        add_stage<ForwardOperands>(tile, left, left + ROWS * DEPTH_BYTES, row0, column0);
    });

    const int64 pixel0 = first_pixel + row0;
    const int output0 = first_channel + column0;
    if (g.o % 2 == 0)
        store_tile<true>(tile, y, bias, pixel0, pixels, output0, g.o);
    else
        store_tile<false>(tile, y, bias, pixel0, pixels, output0, g.o);
}

// Launch: by ops/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_forward_mma_128x128(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    forward<128, 128, 2, true>(x, weight, bias, y, {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x});
}

// Launch: by ops/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_forward_mma_128x64(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    forward<128, 64, 2, true>(x, weight, bias, y, {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x});
}

// Launch: by ops/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_forward_mma_128x32(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    forward<128, 32, 4, true>(x, weight, bias, y, {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x});
}

// Launch: by ops/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_forward_mma_elements(
    const storage_t* __restrict__ x,                 // (n, h, w, c)
    const storage_t* __restrict__ weight,            // (o, kh, kw, c)
    const accumulate_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                       // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x) {
    forward<128, 64, 2, false>(x, weight, bias, y, {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x});
}

template <int COLUMNS>
struct WeightOperands {
    typedef DepthDown<128> Left;
    typedef DepthDown<COLUMNS> Right;
};

// Rows are positions of kh kw c, columns outputs, the depth is the pixels of this block's chunk.
template <int COLUMNS, int WARPS_DOWN, bool PIECES>
__device__ void backward_weight(const storage_t* __restrict__ x, const storage_t* __restrict__ dy,
                                accumulate_t* __restrict__ partials, const Convolution& g, int64 pixels_per_chunk) {
    constexpr int ROWS = 128, WARPS_ACROSS = THREADS / WARP / WARPS_DOWN;
    constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
    constexpr int STAGE_BYTES = (ROWS + COLUMNS) * DEPTH_BYTES;
    SHARED_DYNAMIC(char, stages);
    SHARED_ARRAY(Patch, patches, [STAGES][DEPTH]);  // of the pixels of a part of the depth, a part ahead of the copies

    const int64 pixels = g.pixels(), first_pixel = blockIdx.z * pixels_per_chunk;
    const int64 first_image = first_pixel / (g.oh * g.ow);
    const int count = (int)(first_pixel + pixels_per_chunk < pixels ? pixels_per_chunk : pixels - first_pixel);
    const int parts = (count + DEPTH - 1) / DEPTH, first = (int)(first_pixel - first_image * (g.oh * g.ow));
    const int depth = g.depth(), first_row = blockIdx.x * ROWS, first_channel = blockIdx.y * COLUMNS;
    auto find_patches = [&](int part, int slot) {
        for (int i = threadIdx.x; i < DEPTH; i += THREADS) {
            const int pixel = part * DEPTH + i;
            patches[slot][i] = Patch::of(g, first + min(pixel, count - 1), pixel < count);
        }
    };
#pragma unroll
    for (int part = 0; part < STAGES; ++part) find_patches(part, part);
    __syncthreads();

    // What this thread copies of every LANES-th pixel: of the patches one piece or number, of dy another.
    constexpr int UNIT = PIECES ? PIECE : 1, UNROLL = PIECES ? DEPTH : 4;
    constexpr int LEFT_LANES = THREADS * UNIT / ROWS, RIGHT_LANES = THREADS * UNIT / COLUMNS;
    const int left_number = threadIdx.x * UNIT % ROWS, right_number = threadIdx.x * UNIT % COLUMNS;
    const int left_lane = threadIdx.x * UNIT / ROWS, right_lane = threadIdx.x * UNIT / COLUMNS;
    const int k = first_row + left_number, output = first_channel + right_number;
    const Tap tap(g, k);
    const unsigned bits = tap.bits();
    const storage_t* const shifted = x + first_image * g.h * g.w * g.c + tap.offset(g);
    const storage_t* const gradients = dy + first_pixel * g.o + output;
    auto copy = [&](int part, int stage) {
        char* const left = stages + stage * STAGE_BYTES;
        char* const right = left + ROWS * DEPTH_BYTES;
#pragma unroll UNROLL
        for (int i = 0; i < DEPTH / LEFT_LANES; ++i) {
            const int row = left_lane + i * LEFT_LANES;
            const Patch patch = patches[stage][row];
            char* const to = left + DepthDown<ROWS>::offset(row, left_number / PIECE) + left_number % PIECE * (int)sizeof(storage_t);
            if constexpr (PIECES)
                copy_piece(to, shifted + patch.offset, x, patch.inside(bits));
            else
                copy_element(to, shifted + patch.offset, x, patch.inside(bits));
        }
#pragma unroll UNROLL
        for (int i = 0; i < DEPTH / RIGHT_LANES; ++i) {
            const int row = right_lane + i * RIGHT_LANES, pixel = part * DEPTH + row;
            char* const to = right + DepthDown<COLUMNS>::offset(row, right_number / PIECE) + right_number % PIECE * (int)sizeof(storage_t);
            if constexpr (PIECES)
                copy_piece(to, gradients + (int64)pixel * g.o, dy, pixel < count && output < g.o);
            else
                copy_element(to, gradients + (int64)pixel * g.o, dy, pixel < count && output < g.o);
        }
        // Into the slot that was read STAGES - 1 parts and at least a barrier ago; it is read next after another barrier.
        if (part + 1 >= STAGES) find_patches(part + 1, stage + 1 == STAGES ? 0 : stage + 1);
    };

    const int row0 = warp_index() % WARPS_DOWN * WARP_ROWS, column0 = warp_index() / WARPS_DOWN * WARP_COLUMNS;
    WarpTile<WARP_ROWS, WARP_COLUMNS> tile;
    run_pipeline(parts, copy, [&](int stage) {
        const char* const left = stages + stage * STAGE_BYTES;
        add_stage<WeightOperands<COLUMNS>>(tile, left, left + ROWS * DEPTH_BYTES, row0, column0);
    });

    accumulate_t* const partial = partials + (int64)blockIdx.z * g.o * depth;
#pragma unroll
    for (int n = 0; n < tile.N; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int column = first_channel + column0 + tile.column(n, j);
            if (column >= g.o) continue;
#pragma unroll
            for (int i = 0; i < 2 * tile.M; ++i) {
                const int row = first_row + row0 + tile.row(i / 2, i % 2 * 2);
                if (row < depth) partial[(int64)column * depth + row] = tile.sums[i / 2][n][i % 2 * 2 + j];
            }
        }
}

// Launch: by ops/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_backward_weight_mma_128x128(
    const storage_t* __restrict__ x,      // (n, h, w, c)
    const storage_t* __restrict__ dy,     // (n, oh, ow, o)
    accumulate_t* __restrict__ partials,  // (chunks, o, kh, kw, c)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int chunks,
    int64 pixels_per_chunk) {
    backward_weight<128, 2, true>(x, dy, partials, {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x}, pixels_per_chunk);
}

// Launch: by ops/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_backward_weight_mma_128x64(
    const storage_t* __restrict__ x,      // (n, h, w, c)
    const storage_t* __restrict__ dy,     // (n, oh, ow, o)
    accumulate_t* __restrict__ partials,  // (chunks, o, kh, kw, c)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int chunks,
    int64 pixels_per_chunk) {
    backward_weight<64, 2, true>(x, dy, partials, {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x}, pixels_per_chunk);
}

// Launch: by ops/conv2d_mma.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_backward_weight_mma_elements(
    const storage_t* __restrict__ x,      // (n, h, w, c)
    const storage_t* __restrict__ dy,     // (n, oh, ow, o)
    accumulate_t* __restrict__ partials,  // (chunks, o, kh, kw, c)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int chunks,
    int64 pixels_per_chunk) {
    backward_weight<64, 2, false>(x, dy, partials, {n, h, w, c, oh, ow, o, kh, kw, pad_y, pad_x}, pixels_per_chunk);
}
