// Max-pool 2x2 with positions, 16 bytes of channels at a time: what the layers take for float32. c a multiple of 4.
// Element types: float32.
//
//   y[window] = max over the window, codes[window] = position 0..3 of that maximum (max_pool.cu)
//
// Over max_pool.cu: the bytes are the same, the instructions are a tenth. One index serves four channels; a load brings 16
// bytes; four codes leave as one word; and the windows of a thread are counted by additions, where four divisions by sizes that
// are known at run time cost more than all comparisons. The four loads of a window begin before the first is used: 64 KB for
// 1024 threads of a multiprocessor, where 29 are needed (common/grid_stride.cuh). What is left undone: a code takes a
// byte, where SegNet needs two bits (norm_relu.cu, common/packed_codes.cuh).
//
// Threads: common/grid_stride.cuh, one piece of one window at a time. No sums: the result does not depend on any order.
#include "common/packed_codes.cuh"
#include "common/grid_stride.cuh"

extern "C" __global__ void __launch_bounds__(MAP_THREADS, 4) max_pool_forward_pieces(
    const storage_t* __restrict__ x,  // (n, h, w, c)
    storage_t* __restrict__ y,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    uint8* __restrict__ codes,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    int n, int h, int w, int c) {
    for (ThreadSlice slice(c); slice.exists(c); slice.next())
        for (WindowWalk walk(slice, n, h, w); walk.exists(); walk.next()) {
            const WindowPieces pieces(x, walk.window(slice.channel, h, w, c), w, c);
            PooledPiece best(pieces.at[0]);
#pragma unroll
            for (int code = 1; code < 4; ++code) best.offer(pieces.at[code], code);
            const int64 element = walk.index * c + slice.channel;
            store_piece(y + element, best.piece());
            const unsigned* const chosen = best.chosen;
            *(unsigned*)(codes + element) = chosen[0] | chosen[1] << 8 | chosen[2] << 16 | chosen[3] << 24;
        }
}
