// wgrad on Hopper: 3x3, stride 1, padding 1, channels in multiples of 64, outputs too, or pieces of less than 64
// (a classifier's, the rest of whose tile is not stored); bfloat16, or float32 in planes, summed up in float.
// Element types: tf32, tf32x3, bf16; sm_90a only.
//
//   partials[part][o][r][s][c] = sum over the pixels p of a part of  dy[p, o] * x[p + (r, s) - (1, 1), c]
//
// The pixels are blocks, the parts runs of blocks of equal length, which ops/convolution/conv2d_hopper.py derives from the shape
// alone; conv2d_backward_weight_merge adds them up in their order. A block of threads has 64 outputs x 64 channels x all nine
// taps of one part. Depth is the pixel, which neither map has contiguous: wgmma takes both as they are (MN-major).
//
//   A  dy: 64 outputs x 16 pixels                                the next eight pixels 1024 bytes on
//   B  x: 16 pixels x 192 columns, the three taps of a row       the next eight pixels 1024 bytes on, or a row of the halo;
//      with 64 channels each                                     the next 64 columns one pixel on (128 bytes): they overlap
//
// Blocks have 8x8 pixels, 16 of them two rows, or 16x7, a row of 16 for each product: of maps of 28x28 and 14x14, which are
// padded to whole blocks, 77 % of the pixels in 8x8 are real, and 88 % in 16x7.
//
// Three consumers of a warpgroup each take a row of taps, 96 sums a thread; the fourth warpgroup is the producer (see
// common/hopper_convolution.cuh). A stage is a block of dy and one of x with its border. Pixels beyond the edge of dy are
// zeros; so are those of x.
//
// The order of a sum: blocks of the part in their order; in each, steps of 16 pixels. The measured prototype added the
// same way, but cut the blocks into parts by the multiprocessors of the GPU at hand; so its bits are others.
#include "common/hopper_convolution.cuh"

#define TAP_ROWS 3  // a consumer each
#define WEIGHT_THREADS ((TAP_ROWS + 1) * WARPGROUP)

// A block of pixels: of dy, and of x with its border, in a ring of stages.
template <int ACROSS_, int DOWN_, int STAGES_>
struct PixelBlock {
    static constexpr int ACROSS = ACROSS_, DOWN = DOWN_, STAGES = STAGES_, STEPS = ACROSS * DOWN / 16;
    static constexpr int PITCH = (ACROSS + 2) * ROW_BYTES;  // of a row of x
    static constexpr int DY_BYTES = ACROSS * DOWN * ROW_BYTES, X_BYTES = (DOWN + 2) * PITCH;
    static constexpr int X_PLACE = (X_BYTES + 1023) / 1024 * 1024;
    // Bytes to the next 8 pixels of x, and to the next 16 of each.
    static constexpr int EIGHT_OF_X = ACROSS == 8 ? PITCH : 8 * ROW_BYTES;
    static constexpr int STEP_OF_DY = 16 * ROW_BYTES, STEP_OF_X = 16 / ACROSS * PITCH;
    typedef ::Ring<STAGES, DY_BYTES + X_PLACE> Ring;
};

// A block added to the sums by ordinary additions: each tap has a sum of its own on the tensor cores.
template <class Block>
__device__ __forceinline__ void add_short_sums(Accumulators<192>& sums, MNMajor of_dy, MNMajor of_x) {
    Accumulators<64> of_tap;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Block::STEPS; ++step)
            wgmma(of_tap, moved(of_dy, step * Block::STEP_OF_DY), moved(of_x, tap * ROW_BYTES + step * Block::STEP_OF_X), step > 0);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int j = 0; j < 32; ++j) sums[tap * 32 + j] += of_tap[j];
    }
}

// `blocks_of_part` blocks of the part blockIdx.y.
template <class Block>
__device__ void weight_gradient(const TensorMap& x, const TensorMap& dy, accumulate_t* partials, const Convolution& g, int blocks_of_part) {
    SHARED_DYNAMIC(char, memory);
    SHARED_ARRAY(Mbarrier, barriers, [2 * Block::STAGES]);
    typename Block::Ring blocks(align_stages(memory), barriers);
    if (threadIdx.x == 0) {
        blocks.initialise(TAP_ROWS);
        mbarrier_init_fence();
    }
    __syncthreads();
    const int c = g.depth, o = g.columns;
    const int channel = blockIdx.x % (c / 64) * 64, output = blockIdx.x / (c / 64) * 64;
    const int across = (g.w + Block::ACROSS - 1) / Block::ACROSS, down = (g.h + Block::DOWN - 1) / Block::DOWN;
    const int first = blockIdx.y * blocks_of_part, last = min(first + blocks_of_part, g.n * across * down);
    const int tap_row = warpgroup_index();
    if (tap_row == TAP_ROWS) {
        setmaxnreg_decrease<32>();  // 3 * 160 + 32 is what 512 threads of 128 registers have
        if (warpgroup_thread() != 0) return;
        for (int i = first; i < last; ++i) {
            const int left = i % across * Block::ACROSS, top = i / across % down * Block::DOWN, image = i / across / down;
            for (int plane = 0; plane < g.planes; ++plane)
                for (int other = 0; plane + other < g.planes; ++other) {
                    blocks.acquire(Block::DY_BYTES + Block::X_BYTES);
                    tma_load(blocks.stage(), dy, {other * o + output, left, top, image}, blocks.filled());
                    tma_load(blocks.stage() + Block::DY_BYTES, x, {plane * c + channel, left - 1, top - 1, image}, blocks.filled());
                    blocks.position.advance();
                }
        }
        return;
    }
    setmaxnreg_increase<160>();
    const bool leader = warpgroup_thread() == 0;
    Accumulators<192> sums;
    if constexpr (MULTIPLY == TF32X3)
        for (int j = 0; j < 96; ++j) sums[j] = 0;
    for (int i = 0, all = max(last - first, 0) * g.products(); i < all; ++i) {
        blocks.wait();
        const MNMajor of_dy = mn_major(blocks.stage(), Block::DY_BYTES, 8 * ROW_BYTES);
        const MNMajor of_x = mn_major(blocks.stage() + Block::DY_BYTES + tap_row * Block::PITCH, ROW_BYTES, Block::EIGHT_OF_X);
        if constexpr (MULTIPLY == TF32X3) {
            add_short_sums<Block>(sums, of_dy, of_x);
        } else {
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < Block::STEPS; ++step)
                wgmma(sums, moved(of_dy, step * Block::STEP_OF_DY), moved(of_x, step * Block::STEP_OF_X), i > 0 || step > 0);
            wgmma_commit();
            wgmma_wait<1>();
        }
        if (leader && i > 0) blocks.release_previous();
        blocks.position.advance();
    }
    wgmma_wait<0>();
    if (leader) blocks.release_previous();
#pragma unroll
    for (int j = 0; j < 96; j += 2) {
        const int row = output + wgmma_row(j), column = wgmma_column(j), tap = tap_row * 3 + column / 64;
        if (row >= o) continue;
        accumulate_t* const to = partials + (((int64)blockIdx.y * o + row) * TAPS + tap) * c + channel + column % 64;
        *(Two<accumulate_t>*)to = {sums[j], sums[j + 1]};
    }
}

#define WGRAD_PARAMETERS                                                       \
    const __grid_constant__ TensorMap x,  /* of (n, h, w, planes * c) */       \
    const __grid_constant__ TensorMap dy, /* of (n, h, w, planes * o) */       \
    accumulate_t* __restrict__ partials,  /* (parts, o, 9, c) */               \
    int n, int h, int w, int c, int o, int planes, int parts, int blocks_of_part
#define WGRAD_ARGUMENTS x, dy, partials, {n, h, w, c, o, planes}, blocks_of_part

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps; grid (c / 64 * ceil(o / 64), parts)
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS, 1) conv2d_hopper_backward_weight_8x8(WGRAD_PARAMETERS) {
    weight_gradient<PixelBlock<8, 8, 9>>(WGRAD_ARGUMENTS);
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps; grid (c / 64 * ceil(o / 64), parts)
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS, 1) conv2d_hopper_backward_weight_16x7(WGRAD_PARAMETERS) {
    weight_gradient<PixelBlock<16, 7, 6>>(WGRAD_ARGUMENTS);
}
