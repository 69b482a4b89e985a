// The products of implicit_gemm.cuh for channels that are no whole pieces (3 of an image, 21 of a classifier): numbers of
// patches go one by one from global memory, in fprop to a row of shared memory that a thread puts together, in wgrad into the
// fragments of the tensor cores.
//
// Such a number is 2 or 4 bytes, which no asynchronous copy takes; and an image of few channels, read 9 times over, comes
// from the L1 cache. The bytes that bound the first layer are those of the map of 64 channels, not of the image:
//
//   16x224x224, 3 -> 64, bfloat16   fprop                  wgrad
//   MB                              5 read, 103 written    108 read
//   at 80 % of an H200's 4.25 TB/s  32 us                  32 us
//   tensor cores (m16n8k16)         3.3 GFLOP, 5 us        3.3 GFLOP, 5 us
//
// Beside them count instructions, and the time that a number of the image takes to come. So in fprop a thread finds the patch of
// one row only, a block keeps weights and positions from tile to tile, 16 numbers are in flight at once, and statistics take one
// pass; in wgrad the numbers of the next stage are on their way while one is multiplied.
//
// The depth is padded to steps of an instruction (27 to 32), not to stages; each warp has all columns, so that a number is
// gathered once; and blocks are small enough for several on a multiprocessor, so that one loads while another stores.
#pragma once
#include "implicit_gemm.cuh"

#define GATHER_THREADS 128
#define GATHER_BLOCKS (MULTIPLY == TF32X3 ? 3 : 4)  // on a multiprocessor; three where 128 registers do not suffice
#define GATHER_WEIGHT_BLOCKS (MULTIPLY == TF32X3 ? 2 : 3)
#define WORD_NUMBERS (4 / (int)sizeof(storage_t))   // in a register of a fragment

template <int ROWS, int COLUMNS>
struct GatherTile : BlockTile<ROWS, COLUMNS, GATHER_THREADS, 1> {
    static constexpr bool GATHERED = true;
    static constexpr int KEPT = COLUMNS * DEPTH_BYTES;  // bytes of weights, which one tile after the other is multiplied by
    static constexpr int SHARED = 2 * BlockTile<ROWS, COLUMNS>::STAGE_BYTES;
};

// A position of the depth: how far its number lies from where a patch begins, and which taps must lie inside the image.
struct Position {
    int offset;
    unsigned taps;
    __device__ static Position at(const Convolution& g, int k) {
        const Tap tap(g, k);
        return {tap.offset(g), tap.bits()};
    }
    __device__ storage_t number(const storage_t* images, const Patch& patch) const {
        return patch.inside(taps) ? images[patch.offset + offset] : storage_t(0);
    }
};

// A register of a fragment from the numbers number(0), number(1) of bfloat16, or from number(0) of tf32.
template <class Number>
__device__ unsigned fragment_word(Number number) {
    if constexpr (WORD_NUMBERS == 1)
        return __float_as_uint(number(0));
    else
        return number(0).bits | (unsigned)number(1).bits << 16;
}

// Rows of fprop's product: a thread's own row of every so-many-th tile, walked by additions.
struct RowWalk {
    int image, within, step_images, step_within, rows_of_image;
    __device__ RowWalk(const RowOrder& order, int64 first_row, int64 step) : rows_of_image(order.rows_of_image()) {
        image = (int)(first_row / rows_of_image), within = (int)(first_row - (int64)image * rows_of_image);
        step_images = (int)(step / rows_of_image), step_within = (int)(step - (int64)step_images * rows_of_image);
    }
    __device__ void next() {
        image += step_images, within += step_within;
        if (within >= rows_of_image) within -= rows_of_image, ++image;
    }
};

// fprop: as block_multiply_forward, of the tile whose first row is given by `walk`. The weights pass through shared memory, a
// stage of the depth at a time; `weights_there`: those of the tile before, where the depth is a single stage. Beside them the
// numbers of patches, of which each thread gathers a row. The tile may be stored in their place.
template <class Block>
__device__ void block_gather_forward(typename Block::Tile& tile, const storage_t* __restrict__ x,
                                     const storage_t* __restrict__ weight, const Convolution& g, const RowOrder& order,
                                     const RowWalk& walk, bool exists, bool weights_there) {
    typedef typename Block::Tile Tile;
    SHARED_DYNAMIC(char, stage);
    SHARED_ARRAY(Position, positions, [DEPTH]);
    char* const rows = stage + Block::KEPT;
    static_assert(Block::ROWS == GATHER_THREADS && Block::WARPS_DOWN == GATHER_THREADS / WARP, "a warp gathers its own rows");
    const storage_t* const images = x + (int64)walk.image * g.h * g.w * g.c;
    const Patch patch = patch_of(g, order.at(walk.within + threadIdx.x, exists));
    const storage_t* own = images + patch.offset;
#ifndef SEGNET_HOST
    size_t address = __cvta_generic_to_global(own);
    asm volatile("" : "+l"(address));  // else each number has its offset added to the patch's, and both to `x`
    own = (const storage_t*)__cvta_global_to_generic(address);
#endif

    constexpr int LANES = GATHER_THREADS / STEP_DEPTH;
    const int lane = threadIdx.x / STEP_DEPTH, first_output = blockIdx.y * Block::COLUMNS, depth = g.depth();
    for (int k0 = 0; k0 < depth; k0 += DEPTH) {
        const int end = min(DEPTH, (depth - k0 + STEP_DEPTH - 1) / STEP_DEPTH * STEP_DEPTH);
        __syncthreads();  // the stage before has been read
        if (!weights_there || depth > DEPTH) {
            if (threadIdx.x < DEPTH) positions[threadIdx.x] = Position::at(g, k0 + threadIdx.x);
            for (int k = threadIdx.x % STEP_DEPTH; k < end; k += STEP_DEPTH)
#pragma unroll
                for (int column = lane; column < Block::COLUMNS; column += LANES) {
                    const int output = first_output + column;
                    storage_t* const to = (storage_t*)(stage + DepthContiguous::offset(column, k / PIECE)) + k % PIECE;
                    *to = k0 + k < depth && output < g.o ? weight[(int64)output * depth + k0 + k] : storage_t(0);
                }
            __syncthreads();
        }
#pragma unroll 1
        for (int k = 0; k < end; k += STEP_DEPTH) {
            Piece pieces[2];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                pieces[i / 4].words[i % 4] = fragment_word(
                    [&](int j) { return positions[k + i * WORD_NUMBERS + j].number(own, {0, patch.taps}); });
#pragma unroll
            for (int i = 0; i < 2; ++i)
                *(Piece*)(rows + DepthContiguous::offset(threadIdx.x, k / PIECE + i)) = pieces[i];
        }
        __syncwarp();
#pragma unroll 1
        for (int step = 0; step * STEP_DEPTH < end; ++step) {
            typename Tile::Step f;
            DepthContiguous::load(f.a, rows, Block::row0(), step);
            DepthContiguous::load(f.b, stage, 0, step);
            tile.add_step(f);
        }
    }
}

// A stage of dy: the pixels of a chunk from `pixel0` on, UNIT numbers at a time, a piece or a single one. Two bytes are too few
// for an asynchronous copy; what a stage receives early is safe, since nobody reads it before the barrier after its wait.
template <int UNIT, int COLUMNS>
__device__ void copy_gradients(char* stage, const storage_t* __restrict__ dy, const Convolution& g, const WeightChunk& chunk,
                               int pixel0, int first_output) {
    constexpr int LANES = GATHER_THREADS * UNIT / COLUMNS;
    const int number = threadIdx.x * UNIT % COLUMNS, output = first_output + number;
#pragma unroll 8
    for (int lanes = 0; lanes < DEPTH; lanes += LANES) {
        const int i = lanes + threadIdx.x * UNIT / COLUMNS;
        char* const to = stage + DepthDown<COLUMNS, COLUMNS>::offset(i, number / PIECE);
        const storage_t* const from = dy + (chunk.first_pixel + pixel0 + i) * g.o + output;
        const bool exists = pixel0 + i < chunk.count && output < g.o;
        if constexpr (UNIT == PIECE)
            copy_piece(to, from, dy, exists);
        else
            ((storage_t*)to)[number % PIECE] = exists ? *from : storage_t(0);
    }
}

// wgrad of the pixels of chunk blockIdx.z: as block_backward_weight. dy passes through shared memory in the stages of the
// pipeline; of the pixels of a stage each warp takes one step. At the end the warps add their sums in their order.
template <class Block>
__device__ void block_gather_backward_weight(const storage_t* __restrict__ x, const storage_t* __restrict__ dy,
                                             accumulate_t* __restrict__ partials, const Convolution& g,
                                             int64 pixels_per_chunk) {
    constexpr int ROWS = Block::ROWS, COLUMNS = Block::COLUMNS, STAGE_BYTES = COLUMNS * DEPTH_BYTES, STRIDE = ROWS + 1;
    typedef WarpTile<ROWS, COLUMNS> Tile;
    typedef DepthDown<COLUMNS, COLUMNS> Right;
    static_assert(STAGES * STAGE_BYTES <= Block::SHARED && COLUMNS * STRIDE * sizeof(float) <= Block::SHARED, "no room");
    static_assert(GATHER_THREADS / WARP * STEP_BYTES == DEPTH_BYTES, "a step for each warp");
    SHARED_DYNAMIC(char, stages);
    SHARED_ARRAY(Patch, patches, [STAGES][DEPTH]);

    const WeightChunk chunk(g, pixels_per_chunk);
    const int depth = g.depth(), first_row = blockIdx.x * ROWS, first_output = blockIdx.y * COLUMNS;
    const storage_t* const images = x + (int64)chunk.first_image * g.h * g.w * g.c;
    Position positions[2 * Tile::M];
#pragma unroll
    for (int i = 0; i < 2 * Tile::M; ++i) positions[i] = Position::at(g, first_row + Tile::row(i / 2, i % 2 * 2));

    auto find_patches = [&](int part, int slot) {
        for (int i = threadIdx.x; i < DEPTH; i += GATHER_THREADS) patches[slot][i] = chunk.patch(g, part * DEPTH + i);
    };
    for (int part = 0; part < STAGES; ++part) find_patches(part, part);
    __syncthreads();
    auto begin = [&](int part, int stage) {
        if (part + 1 >= STAGES) find_patches(part + 1, stage + 1 == STAGES ? 0 : stage + 1);  // read a part and a barrier ago
        char* const to = stages + stage * STAGE_BYTES;
        if (g.o % PIECE == 0)
            copy_gradients<PIECE, COLUMNS>(to, dy, g, chunk, part * DEPTH, first_output);
        else
            copy_gradients<1, COLUMNS>(to, dy, g, chunk, part * DEPTH, first_output);
    };
    Tile tile;
    storage_t ahead[4 * Tile::M][WORD_NUMBERS];  // of the next part: on their way while this one is multiplied
    auto gather = [&](int stage) {
        const Patch* const own = patches[stage] + warp_index() * STEP_DEPTH + warp_lane() % 4 * WORD_NUMBERS;
#pragma unroll
        for (int i = 0; i < 4 * Tile::M; ++i)
#pragma unroll
            for (int j = 0; j < WORD_NUMBERS; ++j)
                ahead[i][j] = positions[i / 4 * 2 + i % 2].number(images, own[i % 4 / 2 * (STEP_DEPTH / 2) + j]);
    };
    gather(0);
    run_pipeline(chunk.parts(), begin, [&](int stage) {
        typename Tile::Step f;
#pragma unroll
        for (int i = 0; i < 4 * Tile::M; ++i) f.a[i / 4][i % 4] = fragment_word([&](int j) { return ahead[i][j]; });
        gather(stage + 1 == STAGES ? 0 : stage + 1);  // beyond the last part there are no taps
        Right::load(f.b, stages + stage * STAGE_BYTES, 0, warp_index());
        tile.add_step(f);
    });

    float* const sums = (float*)stages;  // (COLUMNS, ROWS)
    for (int warp = 0; warp < GATHER_THREADS / WARP; ++warp) {
        __syncthreads();  // the last stage has been read, or the sums of the warp before are there
        if (warp_index() == warp)
#pragma unroll
            for (int i = 0; i < 4 * Tile::M * Tile::N; ++i) {
                const int m = i / 4 / Tile::N, n = i / 4 % Tile::N;
                float* const sum = sums + Right::template column<Tile::N>(n, i % 4) * STRIDE + Tile::row(m, i % 4);
                *sum = (warp == 0 ? 0 : *sum) + tile.sums[m][n][i % 4];
            }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += GATHER_THREADS) {
        const int row = first_row + i % ROWS, column = first_output + i / ROWS;
        if (row < depth && column < g.o)
            partials[((int64)blockIdx.z * g.o + column) * depth + row] = sums[i / ROWS * STRIDE + i % ROWS];
    }
}
