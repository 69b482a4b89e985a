// wgrad on Hopper: 3x3, stride 1, padding 1, channels in multiples of 64, outputs too, or pieces of less than 64
// (a classifier's, the rest of whose tile is not stored); bfloat16, or float32 in planes, summed up in float.
// Element types: tf32, tf32x3, bf16; sm_90a only.
//
//   partials[part][o][r][s][c] = sum over the pixels p of a part of  dy[p, o] * x[p + (r, s) - (1, 1), c]
//
// The pixels are blocks of 8x8, the parts runs of blocks of equal length, which ops/convolution/conv2d_hopper.py derives from the shape
// alone; conv2d_backward_weight_merge adds them up in their order. A block of threads has 64 outputs x 64 channels x all nine
// taps of one part. Depth is the pixel, which neither map has contiguous: wgmma takes both as they are (MN-major).
//
//   A  dy: 64 outputs x 16 pixels, two rows of a block           the next row of pixels 1024 bytes on
//   B  x: 16 pixels x 192 columns, the three taps of a row       the next row of pixels a row of the halo on (1280 bytes);
//      with 64 channels each                                     the next 64 columns one pixel on (128 bytes): they overlap
//
// Three consumers of a warpgroup each take a row of taps, 96 sums a thread; the fourth warpgroup is the producer (see
// common/hopper_convolution.cuh). A stage is a block of dy and one of x with its border. Pixels beyond the edge of dy are
// zeros; so are those of x.
//
// The order of a sum: blocks of the part in their order; in each, four steps of 16 pixels. The measured prototype added the
// same way, but cut the blocks into parts by the multiprocessors of the GPU at hand; so its bits are others.
#include "common/hopper_convolution.cuh"

#define TAP_ROWS 3  // a consumer each
#define WEIGHT_THREADS ((TAP_ROWS + 1) * WARPGROUP)
#define WEIGHT_STAGES 9

typedef Ring<WEIGHT_STAGES, ATOM_BYTES + HALO_PLACE> Blocks;

// Bytes to the next two rows of a block, 16 pixels.
#define STEP_OF_DY (2 * BLOCK_SIDE * ROW_BYTES)
#define STEP_OF_X (2 * HALO_PITCH)

// A block added to the sums by ordinary additions: each tap has a sum of its own on the tensor cores.
__device__ __forceinline__ void add_short_sums(Accumulators<192>& sums, MNMajor of_dy, MNMajor of_x) {
    Accumulators<64> of_tap;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            wgmma(of_tap, moved(of_dy, step * STEP_OF_DY), moved(of_x, tap * ROW_BYTES + step * STEP_OF_X), step > 0);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int j = 0; j < 32; ++j) sums[tap * 32 + j] += of_tap[j];
    }
}

// Launch: by ops/convolution/conv2d_hopper.py only, which makes the tensor maps; grid (c / 64 * ceil(o / 64), parts)
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS, 1) conv2d_hopper_backward_weight(
    const __grid_constant__ TensorMap x,   // of (n, h, w, planes * c)
    const __grid_constant__ TensorMap dy,  // of (n, h, w, planes * o)
    accumulate_t* __restrict__ partials,   // (parts, o, 9, c)
    int n, int h, int w, int c, int o, int planes, int parts, int blocks_of_part) {
    SHARED_DYNAMIC(char, memory);
    SHARED_ARRAY(Mbarrier, barriers, [2 * WEIGHT_STAGES]);
    Blocks blocks(align_stages(memory), barriers);
    if (threadIdx.x == 0) {
        blocks.initialise(TAP_ROWS);
        mbarrier_init_fence();
    }
    __syncthreads();
    const Convolution g = {n, h, w, c, o, planes};
    const int channel = blockIdx.x % (c / 64) * 64, output = blockIdx.x / (c / 64) * 64;
    const int across = (w + BLOCK_SIDE - 1) / BLOCK_SIDE, down = (h + BLOCK_SIDE - 1) / BLOCK_SIDE;
    const int first = blockIdx.y * blocks_of_part, last = min(first + blocks_of_part, n * across * down);
    const int tap_row = warpgroup_index();
    if (tap_row == TAP_ROWS) {
        setmaxnreg_decrease<32>();  // 3 * 160 + 32 is what 512 threads of 128 registers have
        auto load = [&](const BlockRows& block, int plane, int other) {
            blocks.acquire(ATOM_BYTES + HALO_BYTES);
            tma_load(blocks.stage(), dy, {other * o + output, block.x, block.y, block.image}, blocks.filled());
            tma_load(blocks.stage() + ATOM_BYTES, x, {plane * c + channel, block.x - 1, block.y - 1, block.image}, blocks.filled());
            blocks.position.advance();
        };
        if (warpgroup_thread() == 0)
            for (int i = first; i < last; ++i)
                for (int plane = 0; plane < planes; ++plane)
                    for (int other = 0; plane + other < planes; ++other) load(BlockRows(g, i), plane, other);
        return;
    }
    setmaxnreg_increase<160>();
    const bool leader = warpgroup_thread() == 0;
    Accumulators<192> sums;
    if constexpr (MULTIPLY == TF32X3)
        for (int j = 0; j < 96; ++j) sums[j] = 0;
    for (int i = 0, all = max(last - first, 0) * g.products(); i < all; ++i) {
        blocks.wait();
        const MNMajor of_dy = mn_major(blocks.stage(), ATOM_BYTES, BLOCK_SIDE * ROW_BYTES);
        const MNMajor of_x = mn_major(blocks.stage() + ATOM_BYTES + tap_row * HALO_PITCH, ROW_BYTES, HALO_PITCH);
        if constexpr (MULTIPLY == TF32X3) {
            add_short_sums(sums, of_dy, of_x);
        } else {
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                wgmma(sums, moved(of_dy, step * STEP_OF_DY), moved(of_x, step * STEP_OF_X), i > 0 || step > 0);
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
