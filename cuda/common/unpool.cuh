// Max-unpool by packed codes, 16 bytes of channels at a time: what unpool_packed.cu and norm_relu.cu share.
//
// A thread loads one value and its codes for four stores, and waits for nobody to read what it wrote: 768 threads of a
// multiprocessor move 82 bytes each in the time of one access, 63 KB where 29 are needed (share.cuh). So one window at a
// time is enough.
#pragma once
#include "packed_codes.cuh"
#include "planes.cuh"
#include "share.cuh"

// y (n, h, w, c) of the windows of a share: make(x[window]) at the coded position, 0 at the others.
template <class Make>
__device__ void unpool_share(
    const storage_t* __restrict__ x, const uint8* __restrict__ codes, const MapOut& y, const Share& share, int n, int h,
    int w, int c, Make make) {
    for (WindowWalk walk(share, n, h, w); walk.exists(); walk.next()) {
        const int64 element = walk.index * c + share.channel;
        const unsigned chosen = piece_codes(codes, element);
        const Piece piece = make(load_piece(x + element));
        const Window window = walk.window(share.channel, h, w, c);
#pragma unroll
        for (int code = 0; code < 4; ++code)
            if (window.holds(code)) y.store(window.at(code, w, c), share.channel, at_position(piece, chosen, code));
    }
}
