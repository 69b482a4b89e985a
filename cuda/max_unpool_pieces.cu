// Max-unpool 2x2, a rung that teaches: 16 bytes of channels a thread. c a multiple of 4.
// Element types: float32.
//
//   y[window.code] = x[window], 0 at the other positions (max_unpool.cu)
//
// Over max_unpool.cu: what max_pool_pieces.cu gains, and stores of 16 bytes, which fill whole sectors: three quarters of y are
// zeros, and yet all of it must be written. Which numbers of a piece stay is decided by masks, not by branches that would part
// the threads of a warp. What is left undone: codes of a byte (unpool_packed.cu), and a map that batch norm has just written
// and this kernel reads again (norm_relu.cu does both in one pass).
//
// Threads: one piece of one window each, grid-stride, as in max_pool_pieces.cu. No sums: any order.
#include "common/packed_codes.cuh"
#include "common/windows.cuh"

extern "C" __global__ void max_unpool_forward_pieces(
    const storage_t* __restrict__ x,  // (n, (h + 1) / 2, (w + 1) / 2, c)
    const uint8* __restrict__ codes,  // (n, (h + 1) / 2, (w + 1) / 2, c)
    storage_t* __restrict__ y,        // (n, h, w, c)
    int n, int h, int w, int c) {
    const int pieces = c / PIECE;
    const int64 count = (int64)n * ((h + 1) / 2) * ((w + 1) / 2) * pieces;
    FOR_EACH_INDEX(i, count) {
        const Window window(i, h, w, pieces);
        const Piece piece = load_piece(x + PIECE * i);
        const unsigned four = ((const unsigned*)codes)[i];
        unsigned chosen = 0;  // two bits a channel; a code that points outside counts as position 0
        for (int k = 0; k < PIECE; ++k) {
            const int code = four >> 8 * k & 255;
            chosen |= (window.holds(code) ? code : 0) << 2 * k;
        }
        for (int code = 0; code < 4; ++code)
            if (window.holds(code))
                store_piece(y + PIECE * window.at(code, w, pieces), at_position(piece, chosen, code));
    }
}
