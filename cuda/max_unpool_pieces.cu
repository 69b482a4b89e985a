// Max-unpool 2x2, 16 bytes of channels at a time: what the layers take for float32, and the backward of their max-pool. c a
// multiple of 4.
// Element types: float32.
//
//   forward   y[window.code] = x[window], 0 at the other positions (max_unpool.cu)
//   backward  dx[window] = dy[window.code]
//
// Over max_unpool.cu: what max_pool_pieces.cu gains, and stores of 16 bytes, which fill whole sectors: three quarters of y are
// zeros, and yet all of it must be written. Which numbers of a piece stay is decided by masks, not by branches that would part
// the threads of a warp. Backward loads the whole window at once: four channels in a row may want all of its positions. In
// flight on a multiprocessor are 20 KB loaded and 64 KB stored forward, 68 KB backward, where 29 are needed (common/grid_stride.cuh).
// What is left undone: codes of a byte (norm_relu.cu), and a map that batch norm has just written and this
// kernel reads again (norm_relu.cu does both in one pass).
//
// Threads: common/grid_stride.cuh, one piece of one window at a time. No sums: any order.
#include "common/packed_codes.cuh"
#include "common/grid_stride.cuh"

// Two bits for each channel of the piece at `element`. A code that points outside counts as position 0.
__device__ inline unsigned positions_of(const uint8* codes, int64 element, const Window& window) {
    const unsigned four = *(const unsigned*)(codes + element);
    unsigned chosen = 0;
#pragma unroll
    for (int k = 0; k < PIECE; ++k) {
        const int code = four >> 8 * k & 255;
        chosen |= (window.holds(code) ? code : 0) << 2 * k;
    }
    return chosen;
}

extern "C" __global__ void __launch_bounds__(MAP_THREADS, 4) max_unpool_forward_pieces(
    const storage_t* __restrict__ x,  // (n, (h + 1) / 2, (w + 1) / 2, c)
    const uint8* __restrict__ codes,  // (n, (h + 1) / 2, (w + 1) / 2, c)
    storage_t* __restrict__ y,        // (n, h, w, c)
    int n, int h, int w, int c) {
    for (ThreadSlice slice(c); slice.exists(c); slice.next())
        for (WindowWalk walk(slice, n, h, w); walk.exists(); walk.next()) {
            const int64 element = walk.index * c + slice.channel;
            const Piece piece = load_piece(x + element);
            const Window window = walk.window(slice.channel, h, w, c);
            const unsigned chosen = positions_of(codes, element, window);
#pragma unroll
            for (int code = 0; code < 4; ++code)
                if (window.holds(code)) store_piece(y + window.at(code, w, c), at_position(piece, chosen, code));
        }
}

extern "C" __global__ void __launch_bounds__(MAP_THREADS, 4) max_unpool_backward_pieces(
    const storage_t* __restrict__ dy,  // (n, h, w, c)
    const uint8* __restrict__ codes,   // (n, (h + 1) / 2, (w + 1) / 2, c)
    storage_t* __restrict__ dx,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    int n, int h, int w, int c) {
    for (ThreadSlice slice(c); slice.exists(c); slice.next())
        for (WindowWalk walk(slice, n, h, w); walk.exists(); walk.next()) {
            const int64 element = walk.index * c + slice.channel;
            const Window window = walk.window(slice.channel, h, w, c);
            const WindowPieces pieces(dy, window, w, c);
            const unsigned chosen = positions_of(codes, element, window);
            store_piece(dx + element, coded_piece(chosen, [&](int code) { return pieces.at[code]; }));
        }
}
