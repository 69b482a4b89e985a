// Confusion matrix: counts[truth, prediction] += 1 for every pixel whose truth is a class (void, 255, is none).
//
// Threads: one pixel each, grid-stride. Integer atomics commute, so the counts do not depend on any order.
#include "common/types.cuh"

extern "C" __global__ void confusion_accumulate(
    const uint8* __restrict__ truth,       // (pixels)
    const uint8* __restrict__ prediction,  // (pixels)
    uint64* __restrict__ counts,           // (classes, classes)
    int64 pixels, int classes) {
    FOR_EACH_INDEX(pixel, pixels) {
        const int t = truth[pixel], p = prediction[pixel];
        if (t < classes && p < classes) atomicAdd(&counts[t * classes + p], (uint64)1);
    }
}
