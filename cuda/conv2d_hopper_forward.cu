// Forward convolution of the fused engine on Hopper: 3x3, stride 1, padding 1, channels in multiples of 64, and the outputs of
// a classifier, pieces of less than 64; bfloat16, or float32 in planes.
// Element types: tf32, tf32x3, bf16; sm_90a only.
//
//   training   y = x * weight, and of the pixels that each consumer has of a tile their number, and of every channel the
//              mean and M2 (the sum of squared distances from it), from which norm_merge_statistics makes batch norm's
//              statistics: y is not read again for them
//   inference  (batch norm folded into weight and bias) y = [max-pool] [ReLU] (x * weight + bias), pooled ones with codes
//
// Main loop, tiles and the way out: common/hopper_convolution.cuh. A window of 2x2 lies within a block of 8x8 pixels, and a
// thread pools one: 16 windows x 8 pieces are the 128 threads. Tiles in a row of the batch have no windows: their pool is a
// kernel of its own (ops/convolution/conv2d_hopper.py takes halo tiles there).
//
// Statistics: a thread looks after 8 channels of every 16th pixel and makes mean and M2 of its own up to eight pixels in
// two passes (E[x^2] - E[x]^2 would cancel); then one thread a channel merges the 16 lanes in their order. No atomics.
#include "common/hopper_convolution.cuh"

struct StoreForward {
    storage_t* y;
    accumulate_t* partials;
    int* counts;
    uint8* pool_codes;
    int o;
    bool with_relu;

    // 8 channels of a thread.
    struct Columns {
        const StoreForward& to;
        int channel, count = 0;
        Values mean = {}, m2 = {};  // of the `count` pixels that the thread has had

        __device__ Columns(const StoreForward& store, int first) : to(store), channel(first) {}
        template <class Rows>
        __device__ void prepare(const Rows&, const WayOut&) {}

        template <class Rows>
        __device__ void store(const Rows& rows, const WayOut& out, const char* place) {
            if (channel >= to.o) return;
            if constexpr (Rows::WINDOWS)
                if (to.pool_codes) return pool(rows, out, place);
            Piece pieces[4];
            bool exists[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int row = out.lane() + k * WayOut::LANES;
                pieces[k] = out.piece(place, row);
                exists[k] = rows.exists(row);
                if (exists[k]) store_piece(to.y + rows.pixel(row) * to.o + channel, to.with_relu ? relu(pieces[k]) : pieces[k]);
            }
            if (to.partials) add(pieces, exists);
        }

        __device__ void pool(const BlockRows& rows, const WayOut& out, const char* place) const {
            const int window = out.lane();
            if (!rows.exists(BlockRows::row_of_window(window, 0))) return;
            auto candidate = [&](int code) {
                const Piece piece = out.piece(place, BlockRows::row_of_window(window, code));
                return to.with_relu ? relu(piece) : piece;
            };
            PooledPiece pooled(candidate(0));
#pragma unroll
            for (int code = 1; code < 4; ++code)
                if (rows.exists(BlockRows::row_of_window(window, code))) pooled.offer(candidate(code), code);
            const int64 element = rows.window(window) * to.o + channel;
            store_piece(to.y + element, pooled.piece());
            store_codes(to.pool_codes, element, pooled.codes());
        }

        // Mean and M2 of four pixels in two passes, then of all so far (Chan, Golub, LeVeque 1979).
        __device__ void add(const Piece (&pieces)[4], const bool (&exists)[4]) {
            Values own = {}, squares = {};
            int added = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Values values = values_of(pieces[k]);
                added += exists[k];
#pragma unroll
                for (int i = 0; i < PIECE; ++i) own.of[i] += exists[k] ? values.of[i] : 0;
            }
            if (added == 0) return;
            const float each = 1.0f / added;
#pragma unroll
            for (int i = 0; i < PIECE; ++i) own.of[i] *= each;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Values values = values_of(pieces[k]);
#pragma unroll
                for (int i = 0; i < PIECE; ++i) {
                    const float distance = exists[k] ? values.of[i] - own.of[i] : 0;
                    squares.of[i] += distance * distance;
                }
            }
            const float share = (float)added / (count + added);
#pragma unroll
            for (int i = 0; i < PIECE; ++i) {
                const float distance = own.of[i] - mean.of[i];
                mean.of[i] += distance * share;
                m2.of[i] += squares.of[i] + distance * distance * (count * share);
            }
            count += added;
        }

        // Of PART channels from `first` on: the lanes together.
        __device__ void finish(WayOut& out, int row, int first) const {
            if (!to.partials) return;
            if (out.column() == 0) out.counts[out.lane()] = count;
            const float* const means = out.exchange(mean, m2);
            const int thread = out.thread;
            if (thread >= PART || first + thread >= to.o) return;
            float pixels = 0, total = 0, squares = 0;
            for (int lane = 0; lane < WayOut::LANES; ++lane) {
                pixels += out.counts[lane];
                total += out.counts[lane] * means[lane * PART + thread];
            }
            const float middle = pixels > 0 ? total / pixels : 0;
            for (int lane = 0; lane < WayOut::LANES; ++lane) {
                const float distance = means[lane * PART + thread] - middle;
                squares += means[(WayOut::LANES + lane) * PART + thread] + out.counts[lane] * (distance * distance);
            }
            accumulate_t* const partial = to.partials + (int64)row * 2 * to.o + first + thread;
            partial[0] = middle;
            partial[to.o] = squares;
            if (first + thread == 0) to.counts[row] = (int)pixels;
        }
    };
};

// What the kernels take, and what they convolve.
#define FPROP_PARAMETERS                                                                        \
    const __grid_constant__ TensorMap x,             /* of (n, h, w, planes * c) */             \
    const __grid_constant__ TensorMap weight,        /* of (o, 9, planes * c) */                \
    const accumulate_t* __restrict__ OPTIONAL bias,  /* (o) */                                  \
    storage_t* __restrict__ y,                       /* (n, out_h, out_w, o) */                 \
    accumulate_t* __restrict__ OPTIONAL partials,    /* (2 * row_tiles, 2, o): mean, M2 */      \
    int* __restrict__ OPTIONAL counts,               /* (2 * row_tiles) */                      \
    uint8* __restrict__ OPTIONAL pool_codes,         /* (n, (h + 1) / 2, (w + 1) / 2, o / 4) */ \
    int n, int h, int w, int c, int o, int out_h, int out_w, int planes, int row_tiles, int relu
#define FPROP_ARGUMENTS \
    x, weight, bias, {n, h, w, c, o, planes}, row_tiles, StoreForward{y, partials, counts, pool_codes, o, relu != 0}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, 1) conv2d_hopper_forward_halo_256x64(FPROP_PARAMETERS) {
    convolve<Halo<2>, ForwardWeights<64>, 9>(FPROP_ARGUMENTS);
}

// Of the classifier: 16x224x224, 64 -> 24 reads 103 MB and writes 39, which takes 42 us at 80 % of an H200's 4.25 TB/s. Each
// product of 64 x 32 x 16 asks shared memory for 3 KB, 24 clocks; 64 columns, of which 40 are zeros, would take 32: of the 100 us
// that the measured 593 TFLOP/s of 64 -> 64 give there remain 75.
// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, 1) conv2d_hopper_forward_halo_256x32(FPROP_PARAMETERS) {
    convolve<Halo<2>, ForwardWeights<32>, 9>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, 1) conv2d_hopper_forward_halo_256x128(FPROP_PARAMETERS) {
    convolve<Halo<2>, ForwardWeights<128>, 5>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, 1) conv2d_hopper_forward_halo_128x128(FPROP_PARAMETERS) {
    convolve<Halo<1>, ForwardWeights<128>, 6>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, 1) conv2d_hopper_forward_columns_256x128(FPROP_PARAMETERS) {
    convolve<Columns<2, 4>, ForwardWeights<128>, 4>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(THREADS, 1) conv2d_hopper_forward_columns_128x128(FPROP_PARAMETERS) {
    convolve<Columns<1, 6>, ForwardWeights<128>, 6>(FPROP_ARGUMENTS);
}
