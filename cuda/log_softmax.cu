// The logarithm of a softmax over the last axis, (pixels, classes): for a loss of one's own. Its exponential is the softmax.
//
//   forward   y  = (x - max x) - log sum exp(x - max x)
//   backward  dx = dy - exp(y) sum dy                  (the output alone is saved)
//
// Threads: one pixel each, grid-stride; the sums of a pixel go from its first class to its last.
#include "common/softmax.cuh"

extern "C" __global__ void log_softmax_forward(
    const storage_t* __restrict__ x,  // (pixels, classes)
    storage_t* __restrict__ y,        // (pixels, classes)
    int64 pixels, int classes) {
    FOR_EACH_INDEX(pixel, pixels) {
        const storage_t* const from = x + pixel * classes;
        const LogSoftmax log_softmax = log_softmax_of(from, classes);
        for (int k = 0; k < classes; ++k) y[pixel * classes + k] = log_softmax.of(from[k]);
    }
}

extern "C" __global__ void log_softmax_backward(
    const storage_t* __restrict__ y,   // (pixels, classes)
    const storage_t* __restrict__ dy,  // (pixels, classes)
    storage_t* __restrict__ dx,        // (pixels, classes)
    int64 pixels, int classes) {
    FOR_EACH_INDEX(pixel, pixels) {
        const int64 first = pixel * classes;
        accumulate_t sum = 0;
        for (int k = 0; k < classes; ++k) sum += dy[first + k];
        for (int k = 0; k < classes; ++k) dx[first + k] = dy[first + k] - exp(y[first + k]) * sum;
    }
}
