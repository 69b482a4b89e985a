// Max-pool 2x2 with positions, a rung that teaches: 16 bytes of channels a thread. c a multiple of 4.
// Element types: float32.
//
//   y[window] = max over the window, codes[window] = position 0..3 of that maximum (max_pool.cu)
//
// Over max_pool.cu: the bytes are the same, the instructions are a quarter. One index, whose four divisions cost more than all
// comparisons, serves four channels; a load brings 16 bytes, so that a thread has 64 under way, not 16; four codes leave as
// one word. What is left undone: a code takes a byte, where SegNet needs two bits (norm_relu.cu, common/packed_codes.cuh).
//
// Threads: one piece of one window each, grid-stride. The map is seen as one of pieces: c / 4 "channels" of 16 bytes.
// Worked index: of a map (1, 4, 6, 8), 2 pieces a pixel, thread 7 has piece 7 % 2 = 1 (channels 4 to 7) of window 3: row 1,
// column 0. It reads pixels (2, 0), (2, 1), (3, 0), (3, 1). No sums: the result does not depend on any order.
#include "common/packed_codes.cuh"
#include "common/windows.cuh"

extern "C" __global__ void max_pool_forward_pieces(
    const storage_t* __restrict__ x,  // (n, h, w, c)
    storage_t* __restrict__ y,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    uint8* __restrict__ codes,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    int n, int h, int w, int c) {
    const int pieces = c / PIECE;
    const int64 count = (int64)n * ((h + 1) / 2) * ((w + 1) / 2) * pieces;
    FOR_EACH_INDEX(i, count) {
        const Window window(i, h, w, pieces);
        PooledPiece best(load_piece(x + PIECE * window.element));
        for (int code = 1; code < 4; ++code)
            if (window.holds(code)) best.offer(load_piece(x + PIECE * window.at(code, w, pieces)), code);
        store_piece(y + PIECE * i, best.piece());
        const unsigned* const chosen = best.chosen;
        ((unsigned*)codes)[i] = chosen[0] | chosen[1] << 8 | chosen[2] << 16 | chosen[3] << 24;
    }
}
