// Pixels by way of shared memory, where a thread needs all the numbers of one: neighbouring threads move neighbouring numbers
// between global and shared memory, several in flight at once, and then each has a pixel for itself.
//
//   block_for_each_staged<THREADS>(from, to, pixels, numbers, [&](T* own, int64 pixel) { ... })
//
// T: a number, or a Piece. `own` are the numbers of a pixel; what is in their place afterwards goes to `to`, unless that is
// null. A pixel begins an odd number of Ts after the one before, so that threads meet every bank once. Every thread of a
// one-dimensional grid of blocks of THREADS calls this; a block takes its share of the pixels in steps of as many as fit.
#pragma once
#include "in_flight.cuh"

#define STAGE_BYTES 28672  // 256 pixels of 28 float32, or of 7 pieces

template <int THREADS, class T, class Use>
__device__ void block_for_each_staged(const T* from, T* to, int64 pixels, int numbers, Use use) {
    constexpr int ROOM = STAGE_BYTES / sizeof(T), LOADS = sizeof(T) == 16 ? 4 : 8;
    SHARED_ARRAY(T, stage, [ROOM]);
    const int stride = numbers | 1, at_once = min(THREADS, ROOM / stride);
    auto place = [&](int64 i) {
        return stage + (stride == numbers ? (int)i : (int)i / numbers * stride + (int)i % numbers);
    };
    for (int64 first = (int64)blockIdx.x * at_once; first < pixels; first += (int64)gridDim.x * at_once) {
        const int count = (int)min((int64)at_once, pixels - first);
        const T* const source = from + first * numbers;
        for_each_in_flight<LOADS>(
            threadIdx.x, count * numbers, THREADS, [&](int64 i) { return load_here(source + i); },
            [&](int64 i, const T& value) { *place(i) = value; });
        __syncthreads();
        if (threadIdx.x < count) use(stage + threadIdx.x * stride, first + threadIdx.x);
        __syncthreads();
        // What a thread stores here is where it loads next: no barrier lies between.
        if (to)
            for (int i = threadIdx.x; i < count * numbers; i += THREADS) to[first * numbers + i] = *place(i);
    }
}
