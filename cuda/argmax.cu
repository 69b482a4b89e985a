// The class of every pixel: the index of its largest logit; the first of equals, and the first NaN before any number.
//
// Threads: one pixel each, grid-stride; a thread reads its `classes` neighbouring logits one after the other.
#include "common/types.cuh"

extern "C" __global__ void argmax_forward(
    const storage_t* __restrict__ logits,  // (pixels, classes)
    uint8* __restrict__ labels,            // (pixels)
    int64 pixels, int classes) {
    FOR_EACH_INDEX(pixel, pixels) {
        const storage_t* const z = logits + pixel * classes;
        int best = 0;
        for (int k = 1; k < classes; ++k)
            if (z[k] > z[best] || (z[k] != z[k] && z[best] == z[best])) best = k;
        labels[pixel] = (uint8)best;
    }
}
