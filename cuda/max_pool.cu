// Max-pool 2x2, stride 2, ceil mode, with the position of the maximum (SegNet, section 3: "storing the max-pooling indices").
//
//   forward   y[window] = max over the window, codes[window] = position 0..3 of that maximum
//   backward  dx[window.code] = dy[window], 0 at the other positions
//
// The first maximum in row-major order wins; a NaN wins over numbers, the first NaN over later ones.
// Shapes and thread mapping: common/windows.cuh. No sums: the result does not depend on any order.
#include "common/windows.cuh"

extern "C" __global__ void max_pool_forward(
    const storage_t* __restrict__ x,  // (n, h, w, c)
    storage_t* __restrict__ y,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    uint8* __restrict__ codes,        // (n, (h + 1) / 2, (w + 1) / 2, c)
    int n, int h, int w, int c) {
    const int64 count = (int64)n * ((h + 1) / 2) * ((w + 1) / 2) * c;
    FOR_EACH_INDEX(i, count) {
        const Window window(i, h, w, c);
        storage_t best = x[window.element];
        int best_code = 0;
        for (int code = 1; code < 4; ++code) {
            if (!window.holds(code)) continue;
            const storage_t candidate = x[window.at(code, w, c)];
            // Not `candidate > best` alone: against a NaN candidate that is false, and the NaN would be lost.
            if (candidate > best || (candidate != candidate && best == best)) {
                best = candidate;
                best_code = code;
            }
        }
        y[i] = best;
        codes[i] = (uint8)best_code;
    }
}

extern "C" __global__ void max_pool_backward(
    const storage_t* __restrict__ dy,  // (n, (h + 1) / 2, (w + 1) / 2, c)
    const uint8* __restrict__ codes,   // (n, (h + 1) / 2, (w + 1) / 2, c)
    storage_t* __restrict__ dx,        // (n, h, w, c)
    int n, int h, int w, int c) {
    const int64 count = (int64)n * ((h + 1) / 2) * ((w + 1) / 2) * c;
    FOR_EACH_INDEX(i, count) scatter_window(dy, codes, dx, i, h, w, c);
}
