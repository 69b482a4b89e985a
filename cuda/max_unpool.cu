// Max-unpool 2x2: each value goes back to the position its pool took it from (SegNet, section 3, figure 3).
//
//   forward   y[window.code] = x[window], 0 at the other positions
//   backward  dx[window] = dy[window.code]
//
// (h, w) is the size of the map that the pool read, so odd sizes come back exactly.
// Shapes and thread mapping: common/windows.cuh. No sums: the result does not depend on any order.
#include "common/windows.cuh"

extern "C" __global__ void max_unpool_forward(
    const storage_t* __restrict__ x,  // (n, (h + 1) / 2, (w + 1) / 2, c)
    const uint8* __restrict__ codes,  // (n, (h + 1) / 2, (w + 1) / 2, c)
    storage_t* __restrict__ y,        // (n, h, w, c)
    int n, int h, int w, int c) {
    const int64 count = (int64)n * ((h + 1) / 2) * ((w + 1) / 2) * c;
    FOR_EACH_INDEX(i, count) scatter_window(x, codes, y, i, h, w, c);
}

extern "C" __global__ void max_unpool_backward(
    const storage_t* __restrict__ dy,  // (n, h, w, c)
    const uint8* __restrict__ codes,   // (n, (h + 1) / 2, (w + 1) / 2, c)
    storage_t* __restrict__ dx,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    int n, int h, int w, int c) {
    const int64 count = (int64)n * ((h + 1) / 2) * ((w + 1) / 2) * c;
    FOR_EACH_INDEX(i, count) gather_window(dy, codes, dx, i, h, w, c);
}
