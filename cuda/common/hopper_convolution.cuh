// 3x3 convolution (stride 1, padding 1) on Hopper's tensor cores: the main loop that fprop and dgrad share, and their
// epilogue. Factors are bfloat16, sums float, results as they are stored. Channels of x are a multiple of 64, outputs
// too, or pieces of less than 64 (a classifier's): what the TMA finds beyond the last of them is zeros.
//
//   fprop  y[p, o]  = sum over taps t, channels c of  x[p + t, c] * weight[o, t, c]         columns are outputs
//   dgrad  dx[p, c] = sum over taps t, outputs o of   dy[p + t, o] * weight[o, 8 - t, c]    columns are channels of x
//
// A block of threads computes tiles of PIXELS x COLUMNS, one after the other, all of the same columns: blocks that run
// together are of all columns of `slots` tiles of pixels and so read the same pixels; then each goes on to the pixels `slots`
// tiles further on. Its last warpgroup is the producer: one thread that has the TMA fill two rings of stages in shared memory, as
// far ahead as they have room. The others are consumers: each multiplies 64 TILES of the pixels by all columns of the tile. A
// consumer keeps one group of products in flight: when it has begun the next one it waits for the one before and releases
// its stages. Multiplying needs no more than two consumers; but the epilogue is a chain of loads, additions and barriers, and a
// multiprocessor works on as many of them at once as it has consumers: four, one for each 64 pixels, where their registers suffice.
//
// Where the pixels of a tile come from is a Source:
//
//   Halo     blocks of 8x8 pixels. A stage is PIXELS / 64 blocks with their borders, 10x10 pixels of 64 channels each, and
//            serves all nine taps: that of tap (r, s) begins r rows and s pixels further on. Zeros beyond the image are the
//            padding. At the right and lower edge of a map whose sizes are no multiples of 8 a block has pixels that do
//            not exist; their sums are not zero (their taps meet real pixels), so an epilogue asks `exists`.
//   Run      PIXELS pixels in a row of the batch, for one tap at a time (TMA's im2col mode): nine times the traffic from
//            the L2 cache, but no pixel is lost at edges, and small maps make more tiles.
//
// and how the weights of a tap lie is a Weights: ForwardWeights as rows of depth (c) for each output, BackwardWeights as
// rows of columns (c) for each of the depth (o): the same array (o, 3, 3, c), of which no flipped copy is needed.
//
// The order of a sum is: channels in chunks of 64; in each the nine taps; in each four steps of 16, which a tensor core
// adds up at once. It depends on nothing else: not on the tile, not on the grid. It is that of the measured prototype
// (docs/explanation/kernels.md), whose bits these kernels give, but for the sign of a zero: sums begin with 0 here.
//
// float32 is multiplied as the sum of `planes` bfloat16, each the rounding of what those before it leave (planes.cuh): a
// map (n, h, w, planes c), a weight (o, 9, planes c). Plane a of the one meets plane b of the other where a + b < planes, one
// product of the same chunk of channels after the other:
//
//   planes  MULTIPLY  products  a product lacks
//   1       BF16      1         nothing: the factors are bfloat16
//   2       TF32      3         3 x 2^-16 of it, where tf32 would lack 2^-10
//   3       TF32X3    6         2^-23 of it, where the roundings of a float32 cost 2^-24
//
// Tensor cores add with bits cut off. For float32's accuracy (TF32X3) they add 64 terms of a sum, one tap of a chunk, and
// ordinary additions the rest: while one consumer adds, others multiply.
//
// The epilogue: a consumer rounds 64 pixels x 128 bytes of columns to what is stored, exchanges them in shared memory,
// and goes on with pieces of 16 bytes: thread t has piece t % 8 of the pixels t / 8, t / 8 + 16, ... What is summed up over the pixels
// of a tile is what is stored.
//
// Two sums over the pixels of each column: a thread has them of its piece of columns and its pixels of a tile, or of a few tiles
// where its registers suffice; a thread a column adds them up over the lanes, in their order, and puts them together with those
// of the tiles before; in the end the first consumer's threads do the same over the consumers. So a block leaves one pair a
// column, whatever number of tiles it had.
// `slots` follows from shape and tile, not from the GPU.
#pragma once
#include "packed_codes.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

#define TAPS 9
#define DEPTH 64            // channels of a chunk: rows of 128 bytes, which the TMA swizzles
#define ROW_BYTES 128
#define ATOM_BYTES 8192     // 64 such rows
#define BLOCK_SIDE 8        // pixels of a block
#define HALO_PITCH 1280     // bytes of a row of a block with its border: 10 pixels
#define HALO_BYTES 12800    // of the 10 rows, which the TMA copies
#define HALO_PLACE 13312    // room for them: a multiple of 1024, where the pattern of the swizzle begins again
#define PART (8 * PIECE)    // columns in 128 bytes of a result

// Warpgroups that multiply. Of float32 in planes the sums and the words of 128 columns leave no room for four.
__device__ constexpr int consumers_of(int pixels, int columns) { return MULTIPLY != BF16 && columns == 128 ? 2 : pixels / 64; }
__device__ constexpr int threads_of(int pixels, int columns) { return (consumers_of(pixels, columns) + 1) * WARPGROUP; }
// What they have of the block's registers, which are 384 threads' of 168 or 640 threads' of 96: 2 * 232 + 40, 4 * 112 + 32.
__device__ constexpr int consumer_registers(int consumers) { return consumers == 4 ? 112 : 232; }
__device__ constexpr int producer_registers(int consumers) { return consumers == 4 ? 32 : 40; }
static_assert(4 * consumer_registers(4) + producer_registers(4) == 5 * 96, "what 640 threads are launched with");
static_assert(2 * consumer_registers(2) + producer_registers(2) == 3 * 168, "what 384 threads are launched with");

struct Convolution {
    int n, h, w;  // of the maps on both sides
    int depth;    // channels of the map that is read
    int columns;  // channels of the map that is made
    int planes;   // of each factor

    __device__ int products() const { return planes * (planes + 1) / 2; }
    // Do so many stages hold all weights of a tile? Those of the next one are the same.
    __device__ bool weights_fit(int stages) const { return MULTIPLY == BF16 && stages == TAPS && depth <= DEPTH; }
};

// Those of a block: of pixels the tiles first, first + slots, ... below `count`, all from the column `column` on.
struct Tiles {
    int first, count, slots, column;

    __device__ Tiles(const Convolution& g, int columns, int tiles, int slots_) : count(tiles), slots(slots_) {
        const int across = (g.columns + columns - 1) / columns;
        first = blockIdx.x / across;
        column = blockIdx.x % across * columns;
    }
};

// The first multiple of 1024 in dynamic shared memory, which is asked for with 1024 bytes to spare.
__device__ inline char* align_stages(char* memory) { return memory + (0u - shared_address(memory)) % 1024; }

// Stages in shared memory, and the barriers that say that one is full or empty. Producer and consumers each have a copy
// of this object and go through the stages in the same order.
template <int STAGES_, int STAGE_BYTES>
struct Ring {
    static constexpr int STAGES = STAGES_, BYTES = STAGES * STAGE_BYTES;
    char* stages;
    Mbarrier *full, *empty;
    RingPosition<STAGES> position;
    bool kept = false;  // what has been filled stays for good: there is nothing more to copy or to wait for

    __device__ Ring(char* memory, Mbarrier* barriers) : stages(memory), full(barriers), empty(barriers + STAGES) {}
    __device__ void initialise(int consumers) const {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full[i], 1);
            mbarrier_init(empty[i], consumers);
        }
    }
    __device__ char* stage() const { return stages + position.stage * STAGE_BYTES; }
    __device__ Mbarrier& filled() const { return full[position.stage]; }

    // The producer: waits until the stage is empty, and announces what will be copied to it.
    __device__ void acquire(int bytes) const {
        mbarrier_wait(empty[position.stage], position.parity ^ 1);
        mbarrier_arrive_expect_tx(full[position.stage], bytes);
    }
    // A consumer: waits until the stage is full.
    __device__ void wait() const {
        if (!kept) mbarrier_wait(full[position.stage], position.parity);
    }
    // One thread of a consumer: the stage before this one has been read.
    __device__ void release_previous() const { mbarrier_arrive(empty[(position.stage + STAGES - 1) % STAGES]); }
};

// 64 pixels of a consumer: a block of 8x8; `next` and `advance` go on to others without dividing again. A chain of divisions takes
// hundreds of clocks, and a consumer would have it before each of its tiles.
struct BlockRows {
    static constexpr bool WINDOWS = true;
    int image, y, x;  // of its first pixel
    int images, h, w;

    __device__ BlockRows(const Convolution& g, unsigned block) : images(g.n), h(g.h), w(g.w) {
        const unsigned across = (w + BLOCK_SIDE - 1u) / BLOCK_SIDE, down = (h + BLOCK_SIDE - 1u) / BLOCK_SIDE;
        x = block % across * BLOCK_SIDE;
        y = block / across % down * BLOCK_SIDE;
        image = block / across / down;
    }
    __device__ void next() { advance(BLOCK_SIDE, 0, 0); }
    __device__ void advance(const BlockRows& by) { advance(by.x, by.y, by.image); }  // as far as it is from the first one
    __device__ void advance(int across, int down, int images_) {
        x += across, y += down, image += images_;
        if (x >= w) x -= (w + BLOCK_SIDE - 1) & -BLOCK_SIDE, y += BLOCK_SIDE;
        if (y >= h) y -= (h + BLOCK_SIDE - 1) & -BLOCK_SIDE, ++image;
    }
    // Without branches: the three comparisons become one predicate.
    __device__ bool exists(unsigned row) const {
        return (image < images) & (y + (int)(row / BLOCK_SIDE) < h) & (x + (int)(row % BLOCK_SIDE) < w);
    }
    __device__ int count() const { return image < images ? min(h - y, BLOCK_SIDE) * min(w - x, BLOCK_SIDE) : 0; }
    __device__ int64 pixel(unsigned row) const {
        return (image * h + y) * w + x + (int)(row / BLOCK_SIDE * w + row % BLOCK_SIDE);
    }
    __device__ int pixels_between(int rows) const { return rows / BLOCK_SIDE * w; }  // of a multiple of 8
    // 2x2 windows: 16 of them, four in a row.
    __device__ static unsigned row_of_window(unsigned window, unsigned code) {
        return (window / 4 * 2 + code / 2) * BLOCK_SIDE + window % 4 * 2 + code % 2;
    }
    __device__ int64 window(unsigned number) const {
        const int across = (w + 1) / 2;
        return (image * ((h + 1) / 2) + y / 2) * across + x / 2 + (int)(number / 4 * across + number % 4);
    }
};

template <int PIXELS, int COLUMNS_>
struct Halo {
    typedef BlockRows Rows;
    static constexpr int COLUMNS = COLUMNS_, CONSUMERS = consumers_of(PIXELS, COLUMNS);
    static constexpr int BLOCKS = PIXELS / 64, TILES = BLOCKS / CONSUMERS;
    static constexpr int STAGES = 2, STAGE_BYTES = BLOCKS * HALO_PLACE;
    static constexpr int COPIED = BLOCKS * HALO_BYTES, TAPS_OF_STAGE = TAPS, TILE_BYTES = HALO_PLACE, PITCH = HALO_PITCH;

    // Where a tile lies, worked out once: the producer is one thread, and its divisions would take longer than the products.
    struct Pixels {
        BlockRows first;
        __device__ Pixels(const Convolution& g, int tile) : first(g, tile * BLOCKS) {}
        __device__ void load(char* stage, const TensorMap& map, int channel, int, Mbarrier& full) const {
            BlockRows block = first;  // one beyond the last image is loaded as zeros
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i, block.next())
                tma_load(stage + i * HALO_PLACE, map, {channel, block.x - 1, block.y - 1, block.image}, full);
        }
    };
    __device__ static constexpr int offset(int tap) { return tap / 3 * HALO_PITCH + tap % 3 * ROW_BYTES; }
    // The first of a consumer's.
    __device__ static Rows rows(const Convolution& g, int tile, int consumer) { return Rows(g, tile * BLOCKS + consumer * TILES); }
};

// 64 pixels of a consumer, in the order of the batch.
struct RunRows {
    static constexpr bool WINDOWS = false;
    int first, pixels;
    __device__ void next() { first += 64; }
    __device__ void advance(const RunRows& by) { first += by.first; }
    __device__ bool exists(unsigned row) const { return first + (int)row < pixels; }
    __device__ int count() const { return max(0, min(pixels - first, 64)); }
    __device__ int64 pixel(unsigned row) const { return first + (int)row; }
    __device__ int pixels_between(int rows) const { return rows; }
};

template <int PIXELS, int COLUMNS_, int STAGES_>
struct Run {
    typedef RunRows Rows;
    static constexpr int COLUMNS = COLUMNS_, CONSUMERS = consumers_of(PIXELS, COLUMNS), TILES = PIXELS / 64 / CONSUMERS;
    static constexpr int STAGES = STAGES_, STAGE_BYTES = PIXELS * ROW_BYTES, COPIED = STAGE_BYTES;
    static constexpr int TAPS_OF_STAGE = 1, TILE_BYTES = ATOM_BYTES, PITCH = BLOCK_SIDE * ROW_BYTES;

    struct Pixels {
        int image, y, x;  // of the first one's first tap
        __device__ Pixels(const Convolution& g, int tile) {
            const int pixel = tile * PIXELS, row = pixel / g.w;
            image = row / g.h, y = row % g.h - 1, x = pixel % g.w - 1;
        }
        __device__ void load(char* stage, const TensorMap& map, int channel, int tap, Mbarrier& full) const {
            tma_load_im2col(stage, map, {channel, x, y, image}, {tap % 3, tap / 3}, full);
        }
    };
    __device__ static constexpr int offset(int) { return 0; }
    __device__ static Rows rows(const Convolution& g, int tile, int consumer) {
        return {tile * PIXELS + consumer * TILES * 64, g.n * g.h * g.w};
    }
};

// The weights of one tap: `depth` of 64, for COLUMNS of the columns.
template <int COLUMNS_>
struct ForwardWeights {
    static constexpr int COLUMNS = COLUMNS_, BYTES = COLUMNS * ROW_BYTES;
    __device__ static void load(char* stage, const TensorMap& weight, const Convolution& g, int plane, int depth, int tap, int column,
                                Mbarrier& full) {
        tma_load(stage, weight, {plane * g.depth + depth, tap, column}, full);
    }
    static constexpr int STEP = 32;  // bytes to the next 16 of depth
    __device__ static KMajor operand(const char* stage) { return k_major(stage, 8 * ROW_BYTES); }
};
template <int COLUMNS_>
struct BackwardWeights {
    static constexpr int COLUMNS = COLUMNS_, BYTES = COLUMNS * ROW_BYTES;
    __device__ static void load(char* stage, const TensorMap& weight, const Convolution& g, int plane, int depth, int tap, int column,
                                Mbarrier& full) {
        const int first = plane * g.columns + column;
#pragma unroll
        for (int i = 0; i < COLUMNS / 64; ++i)
            tma_load(stage + i * ATOM_BYTES, weight, {first + 64 * i, TAPS - 1 - tap, depth}, full);
    }
    static constexpr int STEP = 16 * ROW_BYTES;
    __device__ static MNMajor operand(const char* stage) { return mn_major(stage, ATOM_BYTES, 8 * ROW_BYTES); }
};

// The thread's number, read anew. What is derived from threadIdx the compiler derives once for all tiles, and keeps it through
// the main loop, whose sums need the registers. Unsigned: a remainder is then one instruction.
__device__ inline unsigned thread_read_anew() {
#ifdef SEGNET_HOST
    return threadIdx.x;
#else
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#endif
}

#define NUMBERS (4 / (int)sizeof(storage_t))  // in a word
#define WORDS 16  // that a thread has of 64 pixels x 128 bytes: two neighbouring bfloat16, or a float32

// What a consumer has of shared memory in the epilogue, and how its threads meet. `begin` comes before everything else.
struct Epilogue {
    static constexpr int LANES = 16, NUMBER = sizeof(storage_t);  // bytes of one
    char* place;  // 64 pixels x 128 bytes
    int consumer;
    unsigned thread;  // of the warpgroup

    __device__ Epilogue(char* places, int consumer_) : place(places + consumer_ * ATOM_BYTES), consumer(consumer_) {}
    __device__ void begin() { thread = thread_read_anew() % WARPGROUP; }
    __device__ int column() const { return (int)(thread % 8 * PIECE); }
    __device__ unsigned lane() const { return thread / 8; }
    // Where a byte of a row lies: pieces are exchanged so that threads that write, or read, at the same time do not meet in a bank.
    __device__ static unsigned offset(unsigned row, unsigned byte) { return row * ROW_BYTES + (byte ^ row * 8 * NUMBER % ROW_BYTES); }

    // Before the place is written: nobody reads what was there. After that: everybody may read it.
    __device__ void meet() const { named_barrier_sync(1 + consumer, WARPGROUP); }
    __device__ Piece piece(unsigned row) const { return *(const Piece*)(place + offset(row, thread % 8 * PIECE_BYTES)); }
    __device__ float number(unsigned row, unsigned column) const {
        return (float)*(const storage_t*)(place + offset(row, column * NUMBER));
    }

    // Writes PART rounded columns of 64 pixels, whose words are in the order of wgmma's sums (wgmma.cuh): two neighbouring
    // columns at a time, of a row and the one eight further down, then of the columns eight further on.
    __device__ void put(const unsigned (&words)[WORDS]) const {
        const unsigned first = offset(thread / WARP * 16 + thread % WARP / 4, thread % 4 * 2 * NUMBER);
        meet();
#pragma unroll
        for (unsigned j = 0; j < WORDS * NUMBERS / 2; ++j) {
            char* const to = place + (first ^ j / 2 * 8 * NUMBER) + j % 2 * 8 * ROW_BYTES;
            if constexpr (NUMBERS == 2)
                *(unsigned*)to = words[j];
            else
                *(Two<unsigned>*)to = {words[2 * j], words[2 * j + 1]};
        }
        meet();
    }

    __device__ static Piece four_of(const float* numbers) {
        return {{__float_as_uint(numbers[0]), __float_as_uint(numbers[1]), __float_as_uint(numbers[2]), __float_as_uint(numbers[3])}};
    }

    // Two numbers for each of the PART columns, of every lane: their sums over the lanes, for thread t < PART those of column t.
    __device__ Two<float> add_lanes(const Values& first, const Values& second) const {
        float* const numbers = (float*)place + lane() * PART + column();
        meet();
#pragma unroll
        for (int i = 0; i < PIECE; i += 4) {
            *(Piece*)(numbers + i) = four_of(first.of + i);
            *(Piece*)(numbers + LANES * PART + i) = four_of(second.of + i);
        }
        meet();
        const float* const all = (const float*)place + thread;
        Two<float> sums = {};
        if (thread < PART)
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                sums.first += all[lane * PART];
                sums.second += all[(LANES + lane) * PART];
            }
        return sums;
    }
};

// Those of a thread's four pixels that exist: body(k, element), of a map with so many channels, in which the first is `element`.
template <class Rows, class Body>
__device__ __forceinline__ void for_each_pixel(const Rows& rows, const Epilogue& out, int64 element, int channels, Body body) {
#pragma unroll
    for (int k = 0; k < 4; ++k, element += (int64)rows.pixels_between(Epilogue::LANES) * channels)
        if (rows.exists(out.lane() + k * Epilogue::LANES)) body(k, element);
}

// The producer: fills both rings with what the tiles of this block need, in the order in which the consumers take it.
template <class Source, class Weights, class MapRing, class WeightRing>
__device__ void produce(MapRing maps, WeightRing weights, const TensorMap& map, const TensorMap& weight, const Convolution& g,
                        const Tiles& tiles) {
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.slots) {
        const typename Source::Pixels pixels(g, tile);
        for (int channel = 0; channel < g.depth; channel += DEPTH)
            for (int plane = 0; plane < g.planes; ++plane)
                for (int other = 0; plane + other < g.planes; ++other)
#pragma unroll
                    for (int tap = 0; tap < TAPS; ++tap) {
                        if (tap % Source::TAPS_OF_STAGE == 0) {
                            maps.acquire(Source::COPIED);
                            pixels.load(maps.stage(), map, plane * g.depth + channel, tap, maps.filled());
                            maps.position.advance();
                        }
                        if (weights.kept) continue;
                        weights.acquire(Weights::BYTES);
                        Weights::load(weights.stage(), weight, g, other, channel, tap, tiles.column, weights.filled());
                        weights.position.advance();
                    }
        weights.kept = g.weights_fit(WeightRing::STAGES);
    }
}

// A tap of a chunk added to the sums by ordinary additions: each 64 pixels a sum of their own on the tensor cores.
template <class Source, class Weights>
__device__ __forceinline__ void add_short_sums(Accumulators<Weights::COLUMNS> (&sums)[Source::TILES], const char* pixels,
                                               const char* weights) {
    Accumulators<Weights::COLUMNS> of_tap;
    const auto rows = k_major(pixels, Source::PITCH);
    const auto columns = Weights::operand(weights);
#pragma unroll
    for (int i = 0; i < Source::TILES; ++i) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < DEPTH / 16; ++step)
            wgmma(of_tap, moved(rows, i * Source::TILE_BYTES + step * 32), moved(columns, step * Weights::STEP), step > 0);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int j = 0; j < Weights::COLUMNS / 2; ++j) sums[i][j] += of_tap[j];
    }
}

// A consumer: the sums of its part of one tile.
template <class Source, class Weights, class MapRing, class WeightRing>
__device__ __forceinline__ void multiply(Accumulators<Weights::COLUMNS> (&sums)[Source::TILES], MapRing& maps, WeightRing& weights,
                                         const Convolution& g, int consumer) {
    const bool leader = warpgroup_thread() == 0;
    // A first product that ignores the sums would do, but to the compiler it reads them: they would hold their registers from
    // one tile to the next, and the epilogue would have none.
#pragma unroll
    for (int i = 0; i < Source::TILES; ++i)
#pragma unroll
        for (int j = 0; j < Weights::COLUMNS / 2; ++j) sums[i][j] = 0;
    for (int product = 0, all = (g.depth + DEPTH - 1) / DEPTH * g.products(); product < all; ++product) {
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) {
            const bool next_of_maps = tap % Source::TAPS_OF_STAGE == 0, begun = product + tap > 0;
            if (next_of_maps) maps.wait();
            weights.wait();
            const char* const pixels = maps.stage() + consumer * Source::TILES * Source::TILE_BYTES + Source::offset(tap);
            if constexpr (MULTIPLY == TF32X3) {
                add_short_sums<Source, Weights>(sums, pixels, weights.stage());
            } else {
                const auto rows = k_major(pixels, Source::PITCH);
                const auto columns = Weights::operand(weights.stage());
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < DEPTH / 16; ++step)
#pragma unroll
                    for (int i = 0; i < Source::TILES; ++i)
                        wgmma(sums[i], moved(rows, i * Source::TILE_BYTES + step * 32), moved(columns, step * Weights::STEP), true);
                wgmma_commit();
                wgmma_wait<1>();  // the group before this one is done
            }
            if (leader && begun) {
                weights.release_previous();
                if (next_of_maps) maps.release_previous();
            }
            weights.position.advance();
            if (tap % Source::TAPS_OF_STAGE == Source::TAPS_OF_STAGE - 1) maps.position.advance();
        }
    }
    wgmma_wait<0>();
    if (leader) {
        weights.release_previous();
        maps.release_previous();
    }
}

// The sums as they are stored: of each PART columns the TILES of 64 pixels. `bias`, of the `columns` from the tile's first one
// on, may be null.
template <int TILES, int COLUMNS, int PARTS>
__device__ void round_sums(unsigned (&words)[PARTS][WORDS], Accumulators<COLUMNS> (&sums)[TILES], const accumulate_t* bias,
                           int columns) {
    if (bias)
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; j += 4)  // two columns of two rows
            if (wgmma_column(j) < columns) {
                const Two<float> shift = *(const Two<float>*)(bias + wgmma_column(j));
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    sums[i][j] += shift.first, sums[i][j + 1] += shift.second;
                    sums[i][j + 2] += shift.first, sums[i][j + 3] += shift.second;
                }
            }
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; j += NUMBERS) {
            unsigned& word = words[j / NUMBERS / WORDS * TILES + i][j / NUMBERS % WORDS];
            if constexpr (NUMBERS == 2)
                word = bfloat16_pair(sums[i][j], sums[i][j + 1]);
            else
                word = __float_as_uint(sums[i][j] + 0);  // a number of its own, not in the register that the products want
        }
}

// What a consumer has summed up over the pixels of the tiles so far, for thread t < PART of each PART columns those of column t.
template <int ACROSS>
struct BlockSums {
    Two<float> of[ACROSS] = {};
    int pixels = 0, fresh = 0, tiles = 0;  // `fresh`: pixels whose sums a Part still has
};

// The epilogue of a consumer's part of a tile, PART columns of 64 pixels at a time. The loop is not unrolled: it would need more
// registers than there are. So that it finds its part in registers, the other parts move up, and so do the block's sums.
//
// What is done there is a Store. Of each PART columns a thread has a piece, a Store::Part:
//   begin      says which, and leaves it without sums
//   prepare    may ask for what global memory has of 64 pixels, and returns it
//   store      finds their results in shared memory
//   first, second   its sums over the pixels, where has_sums() says so
//   of_tile    what of these goes on from tile to tile, of so many pixels
// and the Store itself has
//   TILES_KEPT how many tiles a Part is kept for, where a tile has no other
//   merge      puts what two runs of pixels have together
//   finish     has that of the whole block
//   fetch_row  may have what `prepare` reads of a row fetched into the L2 cache while the tile is multiplied
template <class Source, class Store, int PARTS>
__device__ void store_tile(Epilogue& out, unsigned (&words)[PARTS][WORDS], BlockSums<PARTS / Source::TILES>& sums,
                           typename Store::Part& part, const Store& store, const typename Source::Rows& own, const Tiles& tiles, int tile) {
    static_assert(PARTS % Source::TILES == 0, "whole columns");
    constexpr int LAST = PARTS / Source::TILES - 1;
    constexpr int KEPT = LAST == 0 ? Store::TILES_KEPT : 1;
    const bool begins = sums.tiles % KEPT == 0, ends = sums.tiles % KEPT == KEPT - 1 || tile + tiles.slots >= tiles.count;
    typename Source::Rows rows = own;
    for (int i = 0; i < Source::TILES; ++i, rows.next()) sums.fresh += rows.count();
#pragma unroll 1
    for (int column = 0; column <= LAST * PART; column += PART) {
        out.begin();
        if (begins) part.begin(out, tiles.column + column);
        rows = own;
#pragma unroll 1
        for (int i = 0; i < Source::TILES; ++i, rows.next()) {
            out.begin();
            const auto asked = part.prepare(rows, out);
            out.put(words[0]);
            part.store(rows, out, asked, begins && i == 0);
#pragma unroll
            for (int k = 1; k < PARTS; ++k)
#pragma unroll
                for (int j = 0; j < WORDS; ++j) words[k - 1][j] = words[k][j];
        }
        if (!ends || !store.has_sums()) continue;
        out.begin();
        const Two<float> of_part = out.add_lanes(part.first, part.second);
        Two<float> total = sums.of[0];
        if (out.thread < PART) total = store.merge(total, sums.pixels, part.of_tile(of_part, sums.fresh), sums.fresh);  // it divides
#pragma unroll
        for (int k = 1; k <= LAST; ++k) sums.of[k - 1] = sums.of[k];
        sums.of[LAST] = total;
    }
    if (ends) sums.pixels += sums.fresh, sums.fresh = 0;
    ++sums.tiles;
}

// What the consumers of a block have summed up, put together in their order.
template <int CONSUMERS, int ACROSS, class Store>
__device__ void finish_block(Epilogue& out, BlockSums<ACROSS>& sums, const Store& store, const Tiles& tiles) {
    out.begin();
    out.meet();
    if (out.thread < PART) ((BlockSums<ACROSS>*)out.place)[out.thread] = sums;
    named_barrier_sync(1 + CONSUMERS, CONSUMERS * WARPGROUP);
    if (out.consumer > 0 || out.thread >= PART) return;
    for (int consumer = 1; consumer < CONSUMERS; ++consumer) {
        const BlockSums<ACROSS>& more = ((const BlockSums<ACROSS>*)(out.place + consumer * ATOM_BYTES))[out.thread];
#pragma unroll
        for (int k = 0; k < ACROSS; ++k) sums.of[k] = store.merge(sums.of[k], sums.pixels, more.of[k], more.pixels);
        sums.pixels += more.pixels;
    }
#pragma unroll
    for (int k = 0; k < ACROSS; ++k) store.finish(tiles.first, tiles.column + k * PART + (int)out.thread, sums.of[k], sums.pixels);
}

// The kernel. In dynamic shared memory lie stages of maps, stages of weights, the places of the epilogues; how much that takes,
// ops/convolution/conv2d_hopper.py knows.
template <class Source, class Weights, int WEIGHT_STAGES, class Store>
__device__ __forceinline__ void convolve(const TensorMap& map, const TensorMap& weight, const accumulate_t* bias,
                                         const Convolution& g, int row_tiles, int slots, const Store& store) {
    constexpr int COLUMNS = Source::COLUMNS, ACROSS = (COLUMNS + PART - 1) / PART, CONSUMERS = Source::CONSUMERS;
    static_assert(COLUMNS == Weights::COLUMNS, "the columns of one tile");
    SHARED_DYNAMIC(char, memory);
    SHARED_ARRAY(Mbarrier, barriers, [2 * (Source::STAGES + WEIGHT_STAGES)]);
    char* const stages = align_stages(memory);
    Ring<Source::STAGES, Source::STAGE_BYTES> maps(stages, barriers);
    Ring<WEIGHT_STAGES, Weights::BYTES> weights(stages + maps.BYTES, barriers + 2 * Source::STAGES);
    if (threadIdx.x == 0) {
        tma_prefetch(map);
        tma_prefetch(weight);
        maps.initialise(CONSUMERS);
        weights.initialise(CONSUMERS);
        mbarrier_init_fence();
    }
    __syncthreads();
    const Tiles tiles(g, COLUMNS, row_tiles, slots);
    const int consumer = warpgroup_index();
    if (consumer == CONSUMERS) {
        setmaxnreg_decrease<producer_registers(CONSUMERS)>();
        if (warpgroup_thread() == 0) produce<Source, Weights>(maps, weights, map, weight, g, tiles);
        return;
    }
    setmaxnreg_increase<consumer_registers(CONSUMERS)>();
    Epilogue epilogue(stages + maps.BYTES + weights.BYTES, consumer);
    BlockSums<ACROSS> block_sums;
    typename Store::Part part(store);
    typename Source::Rows own = Source::rows(g, tiles.first, consumer);
    const typename Source::Rows step = Source::rows(g, tiles.slots, 0);
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.slots, own.advance(step)) {
        typename Source::Rows rows = own;
        for (int i = 0; i < Source::TILES; ++i, rows.next())
            for (unsigned k = thread_read_anew() % WARPGROUP; k < ACROSS * 64; k += WARPGROUP)
                store.fetch_row(rows, k % 64, tiles.column + (int)(k / 64) * PART);
        unsigned words[Source::TILES * ACROSS][WORDS] = {};
        {
            Accumulators<COLUMNS> sums[Source::TILES];
            multiply<Source, Weights>(sums, maps, weights, g, consumer);
            weights.kept = g.weights_fit(WEIGHT_STAGES);
            round_sums(words, sums, bias ? bias + tiles.column : nullptr, g.columns - tiles.column);
        }
        store_tile<Source>(epilogue, words, block_sums, part, store, own, tiles, tile);
    }
    if (store.has_sums()) finish_block<CONSUMERS>(epilogue, block_sums, store, tiles);
}
