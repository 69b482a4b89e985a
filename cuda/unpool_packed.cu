// Max-unpool 2x2 by packed codes: max_unpool.cu for the fused engine, 16 bytes of channels at a time.
// Element types: float32, bfloat16.
//
//   y[window.code] = x[window], 0 at the other positions
//
// Where a batch norm comes before the unpool, norm_relu_unpool_forward does both. What is left for this kernel: the map
// below the first unpool, which is pooled, and inference, where batch norm is part of the convolution.
//
// Where Hopper's convolutions read y of float32, it is written in planes (common/planes.cuh).
//
// It moves, in units of the unpooled map, x (1/4), codes (1/64 or 1/128) and y (1). Threads: common/share.cuh. No sums.
#include "common/unpool.cuh"

extern "C" __global__ void __launch_bounds__(SHARE_THREADS, 4) unpool_packed(
    const storage_t* __restrict__ x,            // (n, (h + 1) / 2, (w + 1) / 2, c)
    const uint8* __restrict__ codes,            // (n, (h + 1) / 2, (w + 1) / 2, c / 4)
    storage_t* __restrict__ OPTIONAL y,         // (n, h, w, c)
    bfloat16* __restrict__ OPTIONAL in_planes,  // (n, h, w, planes * c): y, where it is given
    int n, int h, int w, int c, int planes) {
    for (Share share(c); share.exists(c); share.next())
        unpool_share(
            x, codes, MapOut{y, in_planes, c, planes}, share, n, h, w, c, [](const Piece& piece) { return piece; });
}
