// Batch norm with ReLU, and with max-pool or max-unpool, between two convolutions of the fused engine; and the sums of its
// backward.
// Element types: float32, bfloat16.
//
//   merge statistics  mean, inv_std of a channel from the (mean, M2) of each tile, which the convolution left
//   forward           z = relu((y - mean) inv_std weight + bias), or in its place
//                     where the block ends in a pool: the pooled map, its codes, and y where the pool chose
//                     where an unpool follows: the unpooled map. In inference, where batch norm is part of the convolution,
//                     that is the unpool alone
//   merge gradients   dweight = sum dr xhat, dbias = sum dr, over the tiles
//   backward          dy = weight inv_std (dr - dbias / rows - xhat dweight / rows), xhat = (y - mean) inv_std
//                     dr: the gradient before the ReLU, which conv2d_fused.cu leaves; where the block ends in a pool that of
//                     the pooled map, which belongs to the coded element of each window (the others have dr 0)
//
// batch_norm.cu derives the formulas.
//
// Traffic, which bounds these kernels, in units of the map. Forward: y (1) is read; z (1), or the pooled map and y where the
// pool chose (1/4 each) and codes (1/32 or 1/64), or the unpooled map (4) and codes move beside it. Backward: y (1), dr (1 or
// 1/4), dy (1), which takes the place of dr where they are of one size. Maps of float32 that Hopper's convolutions alone read
// are written in planes (common/planes.cuh).
//
// Threads of maps: common/grid_stride.cuh. A thread has one piece of channels. It loads the numbers of these channels once, and
// LOADS rows (pixels or windows) at a time, or the four pixels of one window. On maps of 28x28 and 14x14 the numbers of the
// channels count as much as the maps: they are 8 loads of 16 bytes (backward 10); where there are no windows they are in flight
// together with the first pieces, but on sm_120. No sums: any order.
//
// Threads of merges: mma.sync leaves thousands of tiles and perhaps 64 channels, so one thread per channel would wait for memory
// thousands of times. A block takes 8 channels (32 bytes of a row of partials, a sector) and 64 lanes of tiles, a lane 12 tiles
// at a time: of the 6272 tiles of 16x224x224 a lane has 98, which are 9 waits, 7 us at 800 ns each. (64 channels are 3.2 MB, 400
// KB a block, of which 49 KB are in flight: more blocks would not wait less.) All sums are in double; statistics are distances
// from the first tile's mean (never E[x^2] - E[x]^2). Lanes are added as a binary tree: the order depends on the shape alone.
#include "common/grid_stride.cuh"
#include "common/packed_codes.cuh"
#include "common/planes.cuh"
#include "common/reduce.cuh"

#define TILE_ROWS 128  // of a tile of conv2d_fused.cu; the last one has what is left. Others say how many theirs have
#define MERGE_CHANNELS 8
#define MERGE_LANES 64
#define MERGE_LOADS 12

// What a convolution left of one channel of a tile (mean and M2, or two sums), and how many rows that is of.
struct Partial {
    float first, second;
    int count;
};

// Launch: grid (c + 7) / 8, block (8, 64)
extern "C" __global__ void __launch_bounds__(MERGE_CHANNELS* MERGE_LANES, 1) norm_merge_statistics(
    const float* __restrict__ partials,       // (tiles, 2, c): mean, M2
    const int* __restrict__ OPTIONAL counts,  // (tiles): rows of each
    float* __restrict__ mean,                 // (c)
    float* __restrict__ inv_std,              // (c)
    float* __restrict__ running_mean,         // (c)
    float* __restrict__ running_var,          // (c)
    int64 rows, int c, int tiles, double eps, double momentum) {
    const int channel = blockIdx.x * MERGE_CHANNELS + threadIdx.x;
    double sums[3] = {0, 0, 0};  // of distances, of their squares, of M2
    const double pivot = channel < c ? partials[channel] : 0;
    auto load = [&](int64 tile) {
        const float* const partial = partials + tile * 2 * c + channel;
        const int count = counts ? load_here(counts + tile) : (int)min(rows - tile * TILE_ROWS, (int64)TILE_ROWS);
        return Partial{load_here(partial), load_here(partial + c), count};
    };
    for_each_in_flight<MERGE_LOADS>(
        threadIdx.y, channel < c ? tiles : 0, MERGE_LANES, load, [&](int64, const Partial& of) {
            const double count = of.count, distance = of.first - pivot;
            sums[0] += count * distance;
            sums[1] += count * distance * distance;
            sums[2] += of.second;
        });
    block_add_lanes<MERGE_LANES, MERGE_CHANNELS>(sums);
    if (threadIdx.y != 0 || channel >= c) return;
    const double offset = sums[0] / rows, m2 = sums[2] + (sums[1] - sums[0] * offset);
    mean[channel] = (float)(pivot + offset);
    inv_std[channel] = (float)(1 / sqrt(m2 / rows + eps));
    running_mean[channel] = (float)((1 - momentum) * running_mean[channel] + momentum * (pivot + offset));
    running_var[channel] = (float)((1 - momentum) * running_var[channel] + momentum * (m2 / (rows - 1)));
}

// Launch: grid (c + 7) / 8, block (8, 64)
extern "C" __global__ void __launch_bounds__(MERGE_CHANNELS* MERGE_LANES, 1) norm_merge_gradients(
    const float* __restrict__ partials,  // (tiles, 2, c): sum of dr, of dr xhat
    float* __restrict__ dweight,         // (c)
    float* __restrict__ dbias,           // (c)
    int c, int tiles) {
    const int channel = blockIdx.x * MERGE_CHANNELS + threadIdx.x;
    double sums[2] = {0, 0};
    auto load = [&](int64 tile) {
        const float* const partial = partials + tile * 2 * c + channel;
        return Partial{load_here(partial), load_here(partial + c), 0};
    };
    for_each_in_flight<MERGE_LOADS>(
        threadIdx.y, channel < c ? tiles : 0, MERGE_LANES, load, [&](int64, const Partial& of) {
            sums[0] += of.first;
            sums[1] += of.second;
        });
    block_add_lanes<MERGE_LANES, MERGE_CHANNELS>(sums);
    if (threadIdx.y != 0 || channel >= c) return;
    dbias[channel] = (float)sums[0];
    dweight[channel] = (float)sums[1];
}

// Forward, applied to a piece of y.
struct Norm {
    Values mean, scale, bias;
    bool relu;
    Norm() = default;
    __device__ Norm(
        const float* means, const float* inv_stds, const float* weights, const float* biases, int64 channel,
        bool with_relu)
        : mean(channels_of(means, channel)),
          scale(channels_of(inv_stds, channel)),
          bias(channels_of(biases, channel)),
          relu(with_relu) {
        const Values weight = channels_of(weights, channel);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) scale.of[i] *= weight.of[i];
    }
    __device__ explicit Norm(bool with_relu) : mean{}, bias{}, relu(with_relu) {  // no batch norm: only the ReLU
#pragma unroll
        for (int i = 0; i < PIECE; ++i) scale.of[i] = 1;
    }
    __device__ Piece apply(const Piece& y) const {
        Values z = values_of(y);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            z.of[i] = (z.of[i] - mean.of[i]) * scale.of[i] + bias.of[i];
            if (relu && z.of[i] <= 0) z.of[i] = 0;  // a NaN stays one
        }
        return piece_of(z);
    }
};

extern "C" __global__ void __launch_bounds__(MAP_THREADS, 3) norm_relu_forward(
    const storage_t* __restrict__ y,            // (rows, c)
    const float* __restrict__ mean,             // (c)
    const float* __restrict__ inv_std,          // (c)
    const float* __restrict__ weight,           // (c)
    const float* __restrict__ bias,             // (c)
    storage_t* __restrict__ OPTIONAL z,         // (rows, c)
    bfloat16* __restrict__ OPTIONAL in_planes,  // (rows, planes * c): z, where it is given
    int64 rows, int c, int planes, int relu) {
    const MapOut out = {z, in_planes, c, planes};
    for (ThreadSlice slice(c); slice.exists(c); slice.next()) {
        Norm norm;
        slice.for_each_row(
            rows, c, [&](int64 i) { return load_piece_here(y + i); },
            [&](int64 i, const Piece& piece) { out.store(i, slice.channel, norm.apply(piece)); },
            [&] { norm = Norm(mean, inv_std, weight, bias, slice.channel, relu); });
    }
}

extern "C" __global__ void __launch_bounds__(MAP_THREADS, 3) norm_relu_pool_forward(
    const storage_t* __restrict__ y,            // (n, h, w, c)
    const float* __restrict__ mean,             // (c)
    const float* __restrict__ inv_std,          // (c)
    const float* __restrict__ weight,           // (c)
    const float* __restrict__ bias,             // (c)
    storage_t* __restrict__ OPTIONAL pooled,    // (n, (h + 1) / 2, (w + 1) / 2, c)
    bfloat16* __restrict__ OPTIONAL in_planes,  // (n, (h + 1) / 2, (w + 1) / 2, planes * c): pooled, where it is given
    uint8* __restrict__ codes,                  // (n, (h + 1) / 2, (w + 1) / 2, c / 4)
    storage_t* __restrict__ chosen,             // (n, (h + 1) / 2, (w + 1) / 2, c): y at the coded positions
    int n, int h, int w, int c, int planes, int relu) {
    const MapOut out = {pooled, in_planes, c, planes};
    for (ThreadSlice slice(c); slice.exists(c); slice.next()) {
        const Norm norm(mean, inv_std, weight, bias, slice.channel, relu);
        for (WindowWalk walk(slice, n, h, w); walk.exists(); walk.next()) {
            const WindowPieces pieces(y, walk.window(slice.channel, h, w, c), w, c);
            PooledPiece pool(norm.apply(pieces.at[0]));
#pragma unroll
            for (int code = 1; code < 4; ++code) pool.offer(norm.apply(pieces.at[code]), code);
            const int64 element = walk.index * c + slice.channel;
            out.store(element, slice.channel, pool.piece());
            store_codes(codes, element, pool.codes());
            store_piece(chosen + element, coded_piece(pool.codes(), [&](int code) { return pieces.at[code]; }));
        }
    }
}

// A thread loads one value and its codes for four stores, and waits for nobody to read what it wrote: 768 threads of a
// multiprocessor move 82 bytes each in the time of one access, 63 KB where 29 are needed (grid_stride.cuh). So one window at a
// time is enough.
extern "C" __global__ void __launch_bounds__(MAP_THREADS, 3) norm_relu_unpool_forward(
    const storage_t* __restrict__ y,             // (n, (h + 1) / 2, (w + 1) / 2, c)
    const uint8* __restrict__ codes,             // (n, (h + 1) / 2, (w + 1) / 2, c / 4)
    const float* __restrict__ OPTIONAL mean,     // (c); without these four: 0, 1, 1, 0
    const float* __restrict__ OPTIONAL inv_std,  // (c)
    const float* __restrict__ OPTIONAL weight,   // (c)
    const float* __restrict__ OPTIONAL bias,     // (c)
    storage_t* __restrict__ OPTIONAL unpooled,   // (n, h, w, c)
    bfloat16* __restrict__ OPTIONAL in_planes,   // (n, h, w, planes * c): unpooled, where it is given
    int n, int h, int w, int c, int planes, int relu) {
    const MapOut out = {unpooled, in_planes, c, planes};
    for (ThreadSlice slice(c); slice.exists(c); slice.next()) {
        Norm norm((bool)relu);
        if (mean) norm = Norm(mean, inv_std, weight, bias, slice.channel, relu);
        for (WindowWalk walk(slice, n, h, w); walk.exists(); walk.next()) {
            const int64 element = walk.index * c + slice.channel;
            const unsigned chosen = piece_codes(codes, element);
            const Piece piece = norm.apply(load_piece(y + element));
            const Window window = walk.window(slice.channel, h, w, c);
#pragma unroll
            for (int code = 0; code < 4; ++code)
                if (window.holds(code))
                    out.store(window.at(code, w, c), slice.channel, at_position(piece, chosen, code));
        }
    }
}

// Backward, applied to a piece of y and of dr.
struct NormBackward {
    Values mean, inv_std, gain, mean_dr, mean_dr_xhat;
    NormBackward() = default;
    __device__ NormBackward(
        const float* means, const float* inv_stds, const float* weights, const float* dweights, const float* dbiases,
        int64 channel, int64 rows)
        : mean(channels_of(means, channel)),
          inv_std(channels_of(inv_stds, channel)),
          gain(channels_of(weights, channel)),
          mean_dr(channels_of(dbiases, channel)),
          mean_dr_xhat(channels_of(dweights, channel)) {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            gain.of[i] *= inv_std.of[i];
            mean_dr.of[i] /= rows;
            mean_dr_xhat.of[i] /= rows;
        }
    }
    __device__ Piece apply(const Piece& y, const Piece& dr) const {
        const Values ys = values_of(y);
        Values gradient = values_of(dr);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const float xhat = (ys.of[i] - mean.of[i]) * inv_std.of[i];
            gradient.of[i] = gain.of[i] * (gradient.of[i] - mean_dr.of[i] - xhat * mean_dr_xhat.of[i]);
        }
        return piece_of(gradient);
    }
};

extern "C" __global__ void __launch_bounds__(MAP_THREADS, 2) norm_relu_backward(
    const storage_t* __restrict__ y,            // (rows, c)
    const float* __restrict__ mean,             // (c)
    const float* __restrict__ inv_std,          // (c)
    const float* __restrict__ weight,           // (c)
    const float* __restrict__ dweight,          // (c)
    const float* __restrict__ dbias,            // (c)
    storage_t* __restrict__ dr,                 // (rows, c), which becomes dy
    bfloat16* __restrict__ OPTIONAL in_planes,  // (rows, planes * c): dy, where it is given; dr stays
    int64 rows, int c, int planes) {
    const MapOut out = {dr, in_planes, c, planes};
    for (ThreadSlice slice(c); slice.exists(c); slice.next()) {
        NormBackward norm;
        slice.for_each_row(
            rows, c, [&](int64 i) { return Two<Piece>{load_piece_here(y + i), load_piece_here(dr + i)}; },
            [&](int64 i, const Two<Piece>& both) { out.store(i, slice.channel, norm.apply(both.first, both.second)); },
            [&] { norm = NormBackward(mean, inv_std, weight, dweight, dbias, slice.channel, rows); });
    }
}

extern "C" __global__ void __launch_bounds__(MAP_THREADS, 2) norm_relu_pool_backward(
    const storage_t* __restrict__ y,            // (n, h, w, c)
    const uint8* __restrict__ codes,            // (n, (h + 1) / 2, (w + 1) / 2, c / 4)
    const storage_t* __restrict__ dr,           // (n, (h + 1) / 2, (w + 1) / 2, c)
    const float* __restrict__ mean,             // (c)
    const float* __restrict__ inv_std,          // (c)
    const float* __restrict__ weight,           // (c)
    const float* __restrict__ dweight,          // (c)
    const float* __restrict__ dbias,            // (c)
    storage_t* __restrict__ OPTIONAL dy,        // (n, h, w, c)
    bfloat16* __restrict__ OPTIONAL in_planes,  // (n, h, w, planes * c): dy, where it is given
    int n, int h, int w, int c, int planes) {
    const MapOut out = {dy, in_planes, c, planes};
    for (ThreadSlice slice(c); slice.exists(c); slice.next()) {
        const NormBackward norm(mean, inv_std, weight, dweight, dbias, slice.channel, (int64)n * h * w);
        for (WindowWalk walk(slice, n, h, w); walk.exists(); walk.next()) {
            const Window window = walk.window(slice.channel, h, w, c);
            const WindowPieces pieces(y, window, w, c);
            const Piece gradient = load_piece_here(dr + walk.index * c + slice.channel);
            const unsigned chosen = piece_codes(codes, walk.index * c + slice.channel);
#pragma unroll
            for (int code = 0; code < 4; ++code)
                if (window.holds(code))
                    out.store(
                        window.at(code, w, c), slice.channel,
                        norm.apply(pieces.at[code], at_position(gradient, chosen, code)));
        }
    }
}
