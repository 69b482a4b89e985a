// dgrad of the fused engine on Hopper: 3x3, stride 1, padding 1, channels in multiples of 64, outputs too, or
// pieces of less than 64 (a classifier's); bfloat16, or float32 in planes.
// Element types: tf32, tf32x3, bf16; sm_90a only.
//
//   dr = the gradient before the ReLU of the block below, from dy of this one: the sum over the taps, [gathered at the codes
//   of the unpool that lies between], zero where the ReLU below was; and over the pixels that a block has, in all its
//   tiles, the sums of dr and of dr xhat, from which norm_merge_gradients makes dbias and dweight of the batch norm below
//
// Main loop, tiles and the epilogue: common/hopper_convolution.cuh; the block below and what it does to a gradient:
// common/block_below.cuh. The weight is read as it is (o, 3, 3, c): wgmma takes its rows as columns (MN-major), and the taps
// are taken from the last to the first, so that no flipped copy is kept.
//
// A thread looks after a piece of channels of every 16th pixel, or with an unpool of one of the 16 windows. In tiles of 64 channels
// of bfloat16 it is the same piece in all tiles: what batch norm has of its channels stays in registers, and so do the sums, for a few
// tiles. What it needs of y below has been fetched into the L2 cache while the tile was multiplied, and is asked for before the barrier
// that its pieces wait at. No atomics.
#include "common/block_below.cuh"
#include "common/hopper_convolution.cuh"

struct StoreGradient {
    Below below;
    const uint8* unpool_codes;
    storage_t* dr;
    accumulate_t* partials;
    int c;

    static constexpr int TILES_KEPT = 8;  // 32 pixels of a thread: of more the sums would be less exact than over the lanes
    template <class Rows>
    __device__ void fetch_row(const Rows& rows, unsigned row, int channel) const {
        if constexpr (Rows::WINDOWS)
            if (unpool_codes) {
                if (row < 16 && rows.exists(BlockRows::row_of_window(row, 0))) fetch(below.y + rows.window(row) * c + channel);
                return;
            }
        if (rows.exists(row)) fetch(below.y + rows.pixel(row) * c + channel);
    }
    __device__ bool has_sums() const { return true; }

    // What a thread asks global memory for.
    struct Asked {
        int64 element;   // of its first pixel, or window
        unsigned codes;  // of the window
        Piece y[4];      // of the block below, for its pixels or its window
    };

    // The piece of channels of a thread.
    struct Part : GradientSums {
        const StoreGradient& to;
        int channel;
        NormBelow norm;

        __device__ explicit Part(const StoreGradient& store) : to(store) {}
        __device__ void begin(const Epilogue& out, int column) {
            GradientSums::operator=({});
            channel = column + out.column(), norm = {to.below, channel};
        }

        template <class Rows>
        __device__ Asked prepare(const Rows& rows, const Epilogue& out) const {
            Asked asked;
            if constexpr (Rows::WINDOWS)
                if (to.unpool_codes) {
                    const unsigned window = out.lane();
                    asked.element = rows.window(window) * to.c + channel;
                    if (rows.exists(BlockRows::row_of_window(window, 0))) {
                        asked.y[0] = load_piece(to.below.y + asked.element);
                        asked.codes = piece_codes(to.unpool_codes, asked.element);
                    }
                    return asked;
                }
            asked.element = rows.pixel(out.lane()) * to.c + channel;
            for_each_pixel(rows, out, asked.element, to.c, [&](int k, int64 at) { asked.y[k] = load_piece(to.below.y + at); });
            return asked;
        }

        template <class Rows>
        __device__ void store(const Rows& rows, const Epilogue& out, const Asked& asked, bool) {
            if constexpr (Rows::WINDOWS)
                if (to.unpool_codes) {
                    const unsigned window = out.lane();
                    if (!rows.exists(BlockRows::row_of_window(window, 0))) return;
                    const auto at = [&](int code) { return out.piece(BlockRows::row_of_window(window, code)); };
                    const Piece dr = coded_piece(asked.codes, at);
                    return store_piece(to.dr + asked.element, norm.gradient(dr, asked.y[0], to.below.relu, *this));
                }
            Piece dr[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) dr[k] = out.piece(out.lane() + k * Epilogue::LANES);
            for_each_pixel(rows, out, asked.element, to.c, [&](int k, int64 at) {
                store_piece(to.dr + at, norm.gradient(dr[k], asked.y[k], to.below.relu, *this));
            });
        }

        __device__ Two<float> of_tile(const Two<float>& sums, int) const { return sums; }
    };

    __device__ Two<float> merge(const Two<float>& total, int, const Two<float>& more, int) const {
        return {total.first + more.first, total.second + more.second};
    }

    __device__ void finish(int row, int channel, const Two<float>& total, int) const {
        partials[(int64)row * 2 * c + channel] = total.first;
        partials[((int64)row * 2 + 1) * c + channel] = total.second * below.inv_std[channel];
    }
};

// What the kernels take, and what they convolve.
#define DGRAD_PARAMETERS                                                                                     \
    const __grid_constant__ TensorMap dy,             /* of (n, h, w, planes * o) */                         \
    const __grid_constant__ TensorMap weight,         /* of (o, 9, planes * c) */                            \
    const storage_t* __restrict__ below_y,            /* (n, out_h, out_w, c) */                             \
    const accumulate_t* __restrict__ mean,            /* (c) */                                              \
    const accumulate_t* __restrict__ inv_std,         /* (c) */                                              \
    const accumulate_t* __restrict__ bn_weight,       /* (c) */                                              \
    const accumulate_t* __restrict__ bn_bias,         /* (c) */                                              \
    const uint8* __restrict__ OPTIONAL unpool_codes,  /* (n, (h + 1) / 2, (w + 1) / 2, c / 4) */             \
    storage_t* __restrict__ dr,                       /* (n, out_h, out_w, c) */                             \
    accumulate_t* __restrict__ partials,              /* (slots, 2, c): sum of dr, of dr xhat */             \
    int n, int h, int w, int c, int o, int out_h, int out_w, int planes, int row_tiles, int slots, int below_relu
#define BELOW Below{below_y, mean, inv_std, bn_weight, bn_bias, below_relu != 0}
#define DGRAD_ARGUMENTS \
    dy, weight, nullptr, {n, h, w, o, c, planes}, row_tiles, slots, StoreGradient{BELOW, unpool_codes, dr, partials, c}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(256, 64), 1) conv2d_hopper_backward_data_halo_256x64(DGRAD_PARAMETERS) {
    convolve<Halo<256, 64>, BackwardWeights<64>, 9>(DGRAD_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(256, 128), 1) conv2d_hopper_backward_data_halo_256x128(DGRAD_PARAMETERS) {
    convolve<Halo<256, 128>, BackwardWeights<128>, 5>(DGRAD_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(128, 128), 1) conv2d_hopper_backward_data_halo_128x128(DGRAD_PARAMETERS) {
    convolve<Halo<128, 128>, BackwardWeights<128>, 6>(DGRAD_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(256, 128), 1) conv2d_hopper_backward_data_columns_256x128(DGRAD_PARAMETERS) {
    convolve<Run<256, 128, 4>, BackwardWeights<128>, 4>(DGRAD_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps and gives it the shared memory of its tile
extern "C" __global__ void __launch_bounds__(threads_of(128, 128), 1) conv2d_hopper_backward_data_columns_128x128(DGRAD_PARAMETERS) {
    convolve<Run<128, 128, 6>, BackwardWeights<128>, 6>(DGRAD_ARGUMENTS);
}
