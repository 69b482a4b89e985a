// The 2x2 windows of stride 2 that max_pool and max_unpool share.
//
// A map (n, h, w, c) has (h+1)/2 x (w+1)/2 windows: at an odd edge the last window is cut off. A code 0..3 names the
// position in its window, row-major: code = 2 * row + column. Two bits per window are all that SegNet stores.
//
//   scatter: every window writes its four elements, the value at the coded one and 0 at the others.
//            It is the backward of max_pool and the forward of max_unpool.
//   gather:  every window reads its coded element. It is the backward of max_unpool.
//
// Windows do not overlap, so nothing collides and no atomics are needed. A code that points outside (which the pool
// never writes) is answered by position 0, never by an access outside the array.
//
// Threads: one channel of one window each, grid-stride over (n, window row, window column, c), c fastest.
#pragma once
#include "types.cuh"

struct Window {
    int c, column, row;
    int64 element;                   // of the map: (n, 2 row, 2 column, c)
    bool second_column, second_row;  // are they there?
    __device__ Window(int64 index, int h, int w, int channels) : c((int)(index % channels)) {
        const int columns = (w + 1) / 2, rows = (h + 1) / 2;
        const int64 window = index / channels, line = window / columns;
        *this = Window(line / rows, (int)(line % rows), (int)(window % columns), c, h, w, channels);
    }
    __device__ Window(int64 image, int row_, int column_, int channel, int h, int w, int channels)
        : c(channel), column(column_), row(row_) {
        element = ((image * h + 2 * row) * w + 2 * column) * channels + c;
        second_column = 2 * column + 1 < w;
        second_row = 2 * row + 1 < h;
    }
    __device__ bool holds(int code) const {
        return code >= 0 && code < 4 && (second_column || !(code & 1)) && (second_row || !(code & 2));
    }
    __device__ int64 at(int code, int w, int channels) const {
        return element + ((code & 2) ? (int64)w * channels : 0) + ((code & 1) ? channels : 0);
    }
};

__device__ inline void scatter_window(
    const storage_t* values, const uint8* codes, storage_t* map, int64 index, int h, int w, int channels) {
    const Window window(index, h, w, channels);
    const int chosen = window.holds(codes[index]) ? codes[index] : 0;
    for (int code = 0; code < 4; ++code)
        if (window.holds(code)) map[window.at(code, w, channels)] = code == chosen ? values[index] : storage_t(0);
}

__device__ inline void gather_window(
    const storage_t* map, const uint8* codes, storage_t* values, int64 index, int h, int w, int channels) {
    const Window window(index, h, w, channels);
    values[index] = map[window.at(window.holds(codes[index]) ? codes[index] : 0, w, channels)];
}
