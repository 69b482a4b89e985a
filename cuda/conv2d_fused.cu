// Convolutions of the fused engine: the main loops of conv2d_mma.cu, with what stands round a convolution of SegNet in
// their loads and stores. Stride 1, kernels up to 15x15; outputs, and in backward channels, a multiple of a piece (4 float32,
// 8 bfloat16). Forward takes any channels: those that are no whole pieces (3 of an image) go through the kernel named "elements",
// whose blocks go from tile to tile (common/gathered_gemm.cuh).
// Element types: tf32, tf32x3, bf16; sm_80 and newer.
//
//   forward          y = x * weight [+ bias], [ReLU], [max-pool]
//                    training: writes y, and of each tile of 128 pixels the mean and M2 of every channel, from which
//                    norm_merge_statistics makes batch norm's statistics: y is not read again for them
//                    inference (batch norm folded into weight and bias): nothing but z, or its pooled map and codes
//   split            the same of inference where few tiles would leave most of a GPU idle (small maps, one image): the
//                    depth is split, blocks leave sums in float, and conv2d_fused_merge.cu does the rest
//   backward_data    dr = the gradient before the ReLU of the block below, from dy of this one: the fprop of dy with the
//                    flipped weight, [gathered at the codes of the unpool], zero where the ReLU below was; and of each
//                    tile the sums of dr and dr xhat, from which norm_merge_gradients makes dbias and dweight
//
// In brackets: by option. Unpooled maps are written once and read by the convolution like any other (norm_relu.cu): to expand
// codes on the way in costs more than the product (docs/explanation/kernels.md). Their gradients are never written: the rows of a
// tile come window by window, and the tile is gathered in the epilogue. z = relu(bn(y)) of the block below is not kept; its sign
// comes from y, which is: where that block ends in a pool, from y at the chosen position.
//
// The epilogue: a tile goes from the registers to shared memory, rounded to storage_t, and from there piece by piece, so
// that global memory sees 16 bytes per thread and a window is four rows of one column. What is summed is what is stored.
// Sums over the rows of a tile: every thread adds up its own, then one thread a column adds those in order. No atomics.
#include "common/block_below.cuh"
#include "common/gathered_gemm.cuh"
#include "common/packed_codes.cuh"

// The tile of a block in shared memory, as it is stored, where the stages of the main loop were. A thread looks after the
// piece of columns from `column()` on, of every LANES-th row from `lane()` on.
template <class Block>
struct StoredTile {
    static constexpr int STRIDE = Block::COLUMNS + 8;  // 8 rows that a warp writes at once then lie in all banks
    static constexpr int ACROSS = Block::COLUMNS / PIECE, LANES = Block::THREADS_OF_BLOCK / ACROSS;
    storage_t* numbers;  // (ROWS, STRIDE)
    float* lanes;        // (2, LANES, COLUMNS): what each thread has summed up
    int number;          // of the tile
    static_assert(Block::KEPT + Block::ROWS * STRIDE * sizeof(storage_t) + 2 * LANES * Block::COLUMNS * sizeof(float) <=
                      Block::SHARED, "no room");

    __device__ static int column() { return (int)threadIdx.x % ACROSS * PIECE; }
    __device__ static int lane() { return (int)threadIdx.x / ACROSS; }
    __device__ static int channel() { return blockIdx.y * Block::COLUMNS + column(); }

    // Every thread brings its part of the tile. `bias` may be null.
    __device__ StoredTile(
        typename Block::Tile& tile, const accumulate_t* bias, bool with_relu, int o, int number)
        : number(number) {
        typedef typename Block::Tile Tile;
        // Not in arrays of their own: with them, a block would take more than the 99 KiB that some GPUs have for one.
        SHARED_DYNAMIC(char, memory);
        numbers = (storage_t*)(memory + Block::KEPT);
        lanes = (float*)(numbers + Block::ROWS * STRIDE);
        if (bias || with_relu) {
#pragma unroll
            for (int i = 0; i < 2 * Tile::N; ++i) {
                const int n = i / 2, output = blockIdx.y * Block::COLUMNS + Block::column0() + Tile::column(n, i % 2);
                const float shift = bias && output < o ? bias[output] : 0;
#pragma unroll
                for (int row = 0; row < 2 * Tile::M; ++row) {
                    float& sum = tile.sums[row / 2][n][row % 2 * 2 + i % 2];
                    sum += shift;
                    if (with_relu && sum <= 0) sum = 0;  // a NaN stays one
                }
            }
        }
        __syncthreads();  // the last stage has been read
#pragma unroll
        for (int i = 0; i < 2 * Tile::M * Tile::N; ++i) {
            const int m = i / 2 / Tile::N, n = i / 2 % Tile::N, half = i % 2 * 2;
            const int row = Block::row0() + Tile::row(m, half), column = Block::column0() + Tile::column(n, 0);
            const float* const sums = tile.sums[m][n] + half;
            *(Two<storage_t>*)(numbers + row * STRIDE + column) = {storage_t(sums[0]), storage_t(sums[1])};
        }
        __syncthreads();
    }
    __device__ Piece piece(int row) const { return *(const Piece*)(numbers + row * STRIDE + column()); }
    __device__ int64 row0() const { return (int64)number * Block::ROWS; }
};

// The sums over all lanes, in their order, of what each thread has summed for its piece of columns: those of column
// threadIdx.x of the block, in threads below COLUMNS. Every thread calls this, once a tile.
template <class Block>
__device__ Two<accumulate_t> add_lanes(const StoredTile<Block>& tile, const Values& first, const Values& second) {
    float* const own = tile.lanes + tile.lane() * Block::COLUMNS + tile.column();
    constexpr int LANES = StoredTile<Block>::LANES, ALL = LANES * Block::COLUMNS;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) own[i] = first.of[i], own[ALL + i] = second.of[i];
    __syncthreads();
    Two<accumulate_t> total = {0, 0};
    if (threadIdx.x < Block::COLUMNS)
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            total.first += tile.lanes[lane * Block::COLUMNS + threadIdx.x];
            total.second += tile.lanes[ALL + lane * Block::COLUMNS + threadIdx.x];
        }
    return total;
}

// partials[tile][0 and 1][channel], for column threadIdx.x of the block.
template <class Block>
__device__ void store_partials(const StoredTile<Block>& tile, accumulate_t* partials, const Two<accumulate_t>& sums, int o) {
    const int channel = blockIdx.y * Block::COLUMNS + threadIdx.x;
    if (threadIdx.x >= Block::COLUMNS || channel >= o) return;
    partials[(int64)tile.number * 2 * o + channel] = sums.first;
    partials[((int64)tile.number * 2 + 1) * o + channel] = sums.second;
}

// y[pixel, output] of the rows of the tile; and for `partials` mean and M2 of each column over the `count` rows that exist,
// from sums of distances from the first row: E[x^2] - E[x]^2 would cancel, but a distance from one of the numbers has a
// square of at most M2, so that M2 keeps all but a factor of 1 + count roundings.
template <class Block>
__device__ void store_map(const StoredTile<Block>& tile, storage_t* y, accumulate_t* partials, int count, int o) {
    const Piece first = tile.piece(0);
    const Values pivot = values_of(first);
    Values distances = {}, squares = {};
    const int rows = tile.channel() < o ? count : 0;
    storage_t* to = y + (tile.row0() + tile.lane()) * o + tile.channel();
#pragma unroll
    for (int i = 0; i < Block::ROWS / StoredTile<Block>::LANES; ++i, to += StoredTile<Block>::LANES * o) {
        const int row = tile.lane() + i * StoredTile<Block>::LANES;
        const Piece piece = row < count ? tile.piece(row) : first;
        if (row < rows) store_piece(to, piece);
        if (!partials) continue;
        const Values values = values_of(piece);
#pragma unroll
        for (int k = 0; k < PIECE; ++k) {
            const float distance = values.of[k] - pivot.of[k];
            distances.of[k] += distance;
            squares.of[k] = fma(distance, distance, squares.of[k]);
        }
    }
    if (!partials) return;
    Two<accumulate_t> sums = add_lanes(tile, distances, squares);
    if (threadIdx.x >= Block::COLUMNS) return;
    const float offset = sums.first / count;
    sums = {(float)tile.numbers[threadIdx.x] + offset, fma(-sums.first, offset, sums.second)};
    store_partials(tile, partials, sums, o);
}

// The maximum of each window and its position, of rows in the order of windows. Which one wins: max_pool.cu.
template <class Block>
__device__ void store_pooled(const StoredTile<Block>& tile, storage_t* pooled, uint8* codes, const RowOrder& order,
                             int count, int o) {
    if (tile.channel() >= o) return;
    for (int window = tile.lane(); 4 * window < count; window += tile.LANES) {
        const int64 row = tile.row0() + 4 * window;
        const Pixel first = order.at((int)(row % order.rows_of_image()), true);
        auto candidate = [&](int code) { return tile.piece(4 * window + code); };
        PooledPiece pool(candidate(0));
#pragma unroll
        for (int code = 1; code < 4; ++code)
            if (first.x + code % 2 < order.w && first.y + code / 2 < order.h) pool.offer(candidate(code), code);
        const int64 element = row / 4 * o + tile.channel();
        store_piece(pooled + element, pool.piece());
        store_codes(codes, element, pool.codes());
    }
}

// How many of the rows of a tile exist.
template <class Block>
__device__ int rows_of_tile(const Convolution& g, const RowOrder& order, int number) {
    return (int)min((int64)g.n * order.rows_of_image() - (int64)number * Block::ROWS, (int64)Block::ROWS);
}

template <class Block>
__device__ void store_forward(typename Block::Tile& tile, const accumulate_t* bias, storage_t* y, accumulate_t* partials,
                              uint8* pool_codes, const Convolution& g, const RowOrder& order, int number, bool with_relu) {
    const StoredTile<Block> stored(tile, bias, with_relu, g.o, number);
    const int count = rows_of_tile<Block>(g, order, number);
    if (pool_codes)
        store_pooled(stored, y, pool_codes, order, count, g.o);
    else
        store_map(stored, y, partials, count, g.o);
}

// Of few channels a block computes every so-many-th tile, with weights that it has loaded once.
template <class Block>
__device__ void forward(const storage_t* __restrict__ x, const storage_t* __restrict__ weight,
                        const accumulate_t* __restrict__ bias, storage_t* __restrict__ y,
                        accumulate_t* __restrict__ partials, uint8* __restrict__ pool_codes, const Convolution& g,
                        bool with_relu, int tiles) {
    const RowOrder order(g, pool_codes != nullptr);
    if constexpr (Block::GATHERED) {
        RowWalk walk(order, (int64)blockIdx.x * Block::ROWS, (int64)gridDim.x * Block::ROWS);
        for (int number = blockIdx.x; number < tiles; number += gridDim.x, walk.next()) {
            typename Block::Tile tile;
            const bool exists = (int)threadIdx.x < rows_of_tile<Block>(g, order, number);
            block_gather_forward<Block>(tile, x, weight, g, order, walk, exists, number != (int)blockIdx.x);
            store_forward<Block>(tile, bias, y, partials, pool_codes, g, order, number, with_relu);
        }
    } else {
        typename Block::Tile tile;
        block_multiply_forward<Block>(tile, x, weight, g, order);
        store_forward<Block>(tile, bias, y, partials, pool_codes, g, order, blockIdx.x, with_relu);
    }
}

// Writes dr of the rows (or windows) of a tile, and the sums of each column.
template <class Block>
__device__ void store_gradient(const StoredTile<Block>& tile, const Below& below, const uint8* unpool_codes, storage_t* dr,
                               accumulate_t* partials, int count, int c) {
    const int channel = tile.channel();
    const NormBelow norm(below, min(channel, c - PIECE));  // beyond the last channel that of the last ones: it stores nothing
    GradientSums sums;
    const int rows_of_pixel = unpool_codes ? 4 : 1;  // a pixel of dr: a row, or the window of an unpool
    if (channel < c)
        for (int i = tile.lane(); i * rows_of_pixel < count; i += tile.LANES) {
            const int64 element = (tile.row0() / rows_of_pixel + i) * c + channel;
            auto row = [&](int code) { return tile.piece(i * rows_of_pixel + code); };
            const Piece piece = unpool_codes ? coded_piece(piece_codes(unpool_codes, element), row) : row(0);
            store_piece(dr + element, norm.gradient(piece, load_piece(below.y + element), below.relu, sums));
        }
    Two<accumulate_t> total = add_lanes(tile, sums.first, sums.second);
    const int column = blockIdx.y * Block::COLUMNS + threadIdx.x;
    if (threadIdx.x < Block::COLUMNS && column < c) total.second *= below.inv_std[column];
    store_partials(tile, partials, total, c);
}

template <class Block>
__device__ void backward_data(const storage_t* __restrict__ dy, const storage_t* __restrict__ flipped, const Below& below,
                              const uint8* __restrict__ unpool_codes, storage_t* __restrict__ dr,
                              accumulate_t* __restrict__ partials, const Convolution& g) {
    const RowOrder order(g, unpool_codes != nullptr);
    typename Block::Tile tile;
    block_multiply_forward<Block>(tile, dy, flipped, g, order);
    const StoredTile<Block> stored(tile, nullptr, false, g.o, blockIdx.x);
    store_gradient(stored, below, unpool_codes, dr, partials, rows_of_tile<Block>(g, order, blockIdx.x), g.o);
}

// What the kernels of fprop take.
#define FPROP_PARAMETERS                                                                                           \
    const storage_t* __restrict__ x,                 /* (n, h, w, c) */                                            \
    const storage_t* __restrict__ weight,            /* (o, kh, kw, c) */                                          \
    const accumulate_t* __restrict__ OPTIONAL bias,  /* (o) */                                                     \
    storage_t* __restrict__ y,                       /* (n, out_h, out_w, o) */                                    \
    accumulate_t* __restrict__ OPTIONAL partials,    /* (tiles, 2, o): mean, M2 */                                 \
    uint8* __restrict__ OPTIONAL pool_codes,         /* (n, (oh + 1) / 2, (ow + 1) / 2, o / 4) */                  \
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int out_h, int out_w, \
    int tiles, int relu

// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, WIDE_BLOCKS) conv2d_fused_forward_128x128(FPROP_PARAMETERS) {
    forward<BlockTile<128, 128>>(x, weight, bias, y, partials, pool_codes, SIZES, relu, tiles);
}

// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_fused_forward_128x64(FPROP_PARAMETERS) {
    forward<BlockTile<128, 64>>(x, weight, bias, y, partials, pool_codes, SIZES, relu, tiles);
}

// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_fused_forward_128x32(FPROP_PARAMETERS) {
    forward<BlockTile<128, 32>>(x, weight, bias, y, partials, pool_codes, SIZES, relu, tiles);
}

// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS) conv2d_fused_forward_elements(FPROP_PARAMETERS) {
    forward<GatherTile<128, 64>>(x, weight, bias, y, partials, pool_codes, SIZES, relu, tiles);
}

#define BELOW {below_y, mean, inv_std, bn_weight, bn_bias, below_relu != 0}

// What the kernels of dgrad take.
#define DGRAD_PARAMETERS                                                                                                      \
    const storage_t* __restrict__ dy,                 /* (n, h, w, c): of fprop (n, oh, ow, o) */                             \
    const storage_t* __restrict__ flipped,            /* (o, kh, kw, c) */                                                    \
    const storage_t* __restrict__ below_y,            /* (n, out_h, out_w, o) */                                              \
    const accumulate_t* __restrict__ mean,            /* (o) */                                                               \
    const accumulate_t* __restrict__ inv_std,         /* (o) */                                                               \
    const accumulate_t* __restrict__ bn_weight,       /* (o) */                                                               \
    const accumulate_t* __restrict__ bn_bias,         /* (o) */                                                               \
    const uint8* __restrict__ OPTIONAL unpool_codes,  /* (n, (oh + 1) / 2, (ow + 1) / 2, o / 4) */                            \
    storage_t* __restrict__ dr,                       /* (n, out_h, out_w, o) */                                              \
    accumulate_t* __restrict__ partials,              /* (tiles, 2, o): sum of dr, of dr xhat */                              \
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int out_h, int out_w, int tiles, \
    int below_relu

// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, WIDE_BLOCKS) conv2d_fused_backward_data_128x128(DGRAD_PARAMETERS) {
    backward_data<BlockTile<128, 128>>(dy, flipped, BELOW, unpool_codes, dr, partials, SIZES);
}

// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_fused_backward_data_128x64(DGRAD_PARAMETERS) {
    backward_data<BlockTile<128, 64>>(dy, flipped, BELOW, unpool_codes, dr, partials, SIZES);
}

// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_fused_backward_data_128x32(DGRAD_PARAMETERS) {
    backward_data<BlockTile<128, 32>>(dy, flipped, BELOW, unpool_codes, dr, partials, SIZES);
}

// Sums of a part of the depth, for conv2d_fused_merge.cu: partials[blockIdx.z][row][output].
// Launch: by ops/convolution/conv2d_fused.py only, which gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_fused_split_128x64(
    const storage_t* __restrict__ x,         // (n, h, w, c)
    const storage_t* __restrict__ weight,    // (o, kh, kw, c)
    accumulate_t* __restrict__ partials,     // (chunks, rows, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int pad_y, int pad_x, int rows, int by_windows,
    int chunks, int parts_per_chunk) {
    typedef BlockTile<128, 64> Block;
    typedef Block::Tile Tile;
    Tile tile;
    const Convolution g = SIZES;
    const RowOrder order(g, by_windows);
    block_multiply_forward<Block>(tile, x, weight, g, order, blockIdx.z * parts_per_chunk, parts_per_chunk);
#pragma unroll
    for (int i = 0; i < 2 * Tile::M; ++i) {
        const int64 row = (int64)blockIdx.x * Block::ROWS + Block::row0() + Tile::row(i / 2, i % 2 * 2);
        if (row >= rows) continue;
#pragma unroll
        for (int j = 0; j < Tile::N; ++j) {
            const int output = blockIdx.y * Block::COLUMNS + Block::column0() + Tile::column(j, 0);
            const float* const sums = tile.sums[i / 2][j] + i % 2 * 2;
            if (output < g.o) *(Two<accumulate_t>*)(partials + ((int64)blockIdx.z * rows + row) * g.o + output) = {sums[0], sums[1]};
        }
    }
}
