// Bilinear resize of (n, h, w, c) to (n, oh, ow, c), as evaluation does with logits: pixel centres at half-integers, the
// border repeated (PyTorch's interpolate(align_corners=False), no antialiasing).
//
//   source position of output row oy:  (oy + 0.5) h / oh - 0.5, clamped to [0, h - 1]
//
// Threads: one output element each, grid-stride, channels fastest.
#include "common/types.cuh"

struct Tap {
    int low, high;
    accumulate_t fraction;  // weight of `high`
    __device__ Tap(int target, int source_size, int target_size) {
        const accumulate_t scale = (accumulate_t)source_size / target_size;
        accumulate_t position = (target + (accumulate_t)0.5) * scale - (accumulate_t)0.5;
        position = position < 0 ? 0 : position;
        low = min((int)position, source_size - 1);
        high = min(low + 1, source_size - 1);
        fraction = position - low;
    }
};

extern "C" __global__ void resize_bilinear_forward(
    const storage_t* __restrict__ x,  // (n, h, w, c)
    storage_t* __restrict__ y,        // (n, oh, ow, c)
    int n, int h, int w, int c, int oh, int ow) {
    const int64 count = (int64)n * oh * ow * c;
    FOR_EACH_INDEX(i, count) {
        const int channel = (int)(i % c);
        const int64 pixel = i / c;
        const Tap column((int)(pixel % ow), w, ow), row((int)(pixel / ow % oh), h, oh);
        const storage_t* const image = x + pixel / ow / oh * h * w * c + channel;
        const storage_t* const above = image + (int64)row.low * w * c;
        const storage_t* const below = image + (int64)row.high * w * c;
        const accumulate_t top = above[(int64)column.low * c] +
                                 column.fraction * ((accumulate_t)above[(int64)column.high * c] - above[(int64)column.low * c]);
        const accumulate_t bottom = below[(int64)column.low * c] +
                                    column.fraction * ((accumulate_t)below[(int64)column.high * c] - below[(int64)column.low * c]);
        y[i] = top + row.fraction * (bottom - top);
    }
}
