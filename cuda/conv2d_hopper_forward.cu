// Forward convolution of the fused engine on Hopper: 3x3, stride 1, padding 1, channels in multiples of 64, and the outputs of
// a classifier, pieces of less than 64; bfloat16, or float32 in planes.
// Element types: tf32, tf32x3, bf16; sm_90a only.
//
//   training   y = x * weight, and of the pixels that a block has, in all its tiles, their number, and of every channel the
//              mean and M2 (the sum of squared distances from it), from which norm_merge_statistics makes batch norm's
//              statistics: y is not read again for them
//   inference  (batch norm folded into weight and bias) y = [max-pool] [ReLU] (x * weight + bias), pooled ones with codes
//
// Main loop, tiles and the epilogue: common/hopper_convolution.cuh. A window of 2x2 lies within a block of 8x8 pixels, and a
// thread pools one: 16 windows x 8 pieces are the 128 threads. Tiles in a row of the batch have no windows: their pool is a
// kernel of its own (ops/convolution/conv2d_hopper.py takes halo tiles there).
//
// Statistics of a consumer's part of a tile, or of four tiles of 64 columns of bfloat16: the sums of the distances d of a channel
// from its first pixel there, the pivot, and of d d. mean = pivot + sum d / n, M2 = sum d d - (sum d)^2 / n. The pivot is one of these n
// pixels, at most 256, so (pivot - mean)^2 <= M2: what cancels is at most n + 1 times what is left (E[x^2] - E[x]^2 may cancel
// altogether). They are put together by mean and M2 (Chan, Golub, LeVeque 1979). No atomics.
#include "common/hopper_convolution.cuh"

struct StoreForward {
    storage_t* y;
    accumulate_t* partials;
    int* counts;
    uint8* pool_codes;
    int o;
    bool with_relu;

    static constexpr int TILES_KEPT = 4;  // 256 pixels from one pivot
    template <class Rows>
    __device__ void fetch_row(const Rows&, unsigned, int) const {}
    __device__ bool has_sums() const { return partials != nullptr; }

    // The piece of channels of a thread.
    struct Part {
        const StoreForward& to;
        int channel;
        float pivot_of_column;  // for the thread that adds it up
        Values pivot, first, second;  // sums of the distances from the pivot, and of their squares

        __device__ explicit Part(const StoreForward& store) : to(store) {}
        __device__ void begin(const Epilogue& out, int column) {
            channel = column + out.column(), first = second = {};
        }
        template <class Rows>
        __device__ Nothing prepare(const Rows&, const Epilogue&) const { return {}; }

        template <class Rows>
        __device__ void store(const Rows& rows, const Epilogue& out, Nothing, bool begins) {
            if (to.partials && begins) {
                pivot = values_of(out.piece(0));
                pivot_of_column = out.number(0, out.thread % PART);
            }
            if (channel >= to.o) return;
            if constexpr (Rows::WINDOWS)
                if (to.pool_codes) return pool(rows, out);
            Piece pieces[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) pieces[k] = out.piece(out.lane() + k * Epilogue::LANES);
            for_each_pixel(rows, out, rows.pixel(out.lane()) * to.o + channel, to.o, [&](int k, int64 at) {
                store_piece(to.y + at, to.with_relu ? relu(pieces[k]) : pieces[k]);
                if (to.partials) add(pieces[k]);
            });
        }

        // Mean and M2 of a column.
        __device__ Two<float> of_tile(const Two<float>& sums, int pixels) const {
            if (pixels == 0) return {};
            const float off = sums.first / pixels;
            return {pivot_of_column + off, sums.second - sums.first * off};
        }

        __device__ void pool(const BlockRows& rows, const Epilogue& out) const {
            const unsigned window = out.lane();
            if (!rows.exists(BlockRows::row_of_window(window, 0))) return;
            auto candidate = [&](int code) {
                const Piece piece = out.piece(BlockRows::row_of_window(window, code));
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

        __device__ void add(const Piece& piece) {
            const Values values = values_of(piece);
#pragma unroll
            for (int i = 0; i < PIECE; ++i) {
                const float distance = values.of[i] - pivot.of[i];
                first.of[i] += distance;
                second.of[i] = fma(distance, distance, second.of[i]);
            }
        }
    };

    // Mean and M2 of `before` pixels and `pixels` more.
    __device__ Two<float> merge(const Two<float>& total, int before, const Two<float>& more, int pixels) const {
        if (pixels == 0 || before == 0) return pixels == 0 ? total : more;
        const float distance = more.first - total.first, share = (float)pixels / (before + pixels);
        return {total.first + distance * share, total.second + more.second + distance * distance * (before * share)};
    }

    __device__ void finish(int row, int channel, const Two<float>& total, int pixels) const {
        if (channel >= o) return;
        accumulate_t* const partial = partials + (int64)row * 2 * o + channel;
        partial[0] = total.first;
        partial[o] = total.second;
        if (channel == 0) counts[row] = pixels;
    }
};

// What the kernels take, and what they convolve.
#define FPROP_PARAMETERS                                                                        \
    const __grid_constant__ TensorMap x,             /* of (n, h, w, planes * c) */             \
    const __grid_constant__ TensorMap weight,        /* of (o, 9, planes * c) */                \
    const accumulate_t* __restrict__ OPTIONAL bias,  /* (o) */                                  \
    storage_t* __restrict__ y,                       /* (n, out_h, out_w, o) */                 \
    accumulate_t* __restrict__ OPTIONAL partials,    /* (slots, 2, o): mean, M2 */              \
    int* __restrict__ OPTIONAL counts,               /* (slots) */                              \
    uint8* __restrict__ OPTIONAL pool_codes,         /* (n, (h + 1) / 2, (w + 1) / 2, o / 4) */ \
    int n, int h, int w, int c, int o, int out_h, int out_w, int planes, int row_tiles, int slots, int relu
#define FPROP_ARGUMENTS \
    x, weight, bias, {n, h, w, c, o, planes}, row_tiles, slots, StoreForward{y, partials, counts, pool_codes, o, relu != 0}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(256, 64), 1) conv2d_hopper_forward_halo_256x64(FPROP_PARAMETERS) {
    convolve<Halo<256, 64>, ForwardWeights<64>, 9>(FPROP_ARGUMENTS);
}

// Of the classifier: 16x224x224, 64 -> 24 reads 103 MB and writes 39, which takes 42 us at 80 % of an H200's 4.25 TB/s; with two
// consumers it took 125 us there, 149 in 64 columns, of which 40 are zeros. Shared memory bounds a product of 64 x 32 x 16: 3 KB, 24 clocks.
// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(256, 32), 1) conv2d_hopper_forward_halo_256x32(FPROP_PARAMETERS) {
    convolve<Halo<256, 32>, ForwardWeights<32>, 9>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(256, 128), 1) conv2d_hopper_forward_halo_256x128(FPROP_PARAMETERS) {
    convolve<Halo<256, 128>, ForwardWeights<128>, 5>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(128, 128), 1) conv2d_hopper_forward_halo_128x128(FPROP_PARAMETERS) {
    convolve<Halo<128, 128>, ForwardWeights<128>, 6>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(256, 128), 1) conv2d_hopper_forward_columns_256x128(FPROP_PARAMETERS) {
    convolve<Run<256, 128, 4>, ForwardWeights<128>, 4>(FPROP_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(128, 128), 1) conv2d_hopper_forward_columns_128x128(FPROP_PARAMETERS) {
    convolve<Run<128, 128, 6>, ForwardWeights<128>, 6>(FPROP_ARGUMENTS);
}
