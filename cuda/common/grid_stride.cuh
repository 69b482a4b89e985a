// Grid-stride loops over the 16-byte pieces of a map that is read and written once: for memory-bound kernels.
//
// To keep a memory busy, as many bytes must be in flight as it delivers in the time that one access takes (Little's law).
// H200: 4.8 TB/s x 800 ns = 3.8 MB, 29 KB on each of 132 multiprocessors. The rate is the data sheet's, the time our estimate of an
// access while the memory is busy; all heads and pages reckon with these two. A kernel that loads one piece of 16 bytes per thread,
// uses it and comes back has half of that in flight where 1024 threads fit, and less while it computes. So
//
//   - a thread issues LOADS loads before it uses the first one (in_flight.cuh). With 768 resident threads, 80 registers each, that is
//     48 KB (backward, two maps: 512 threads, 64 KB), so that a third of the warps may be computing;
//   - its channels never change: what belongs to a channel (mean, gain, ...) is loaded and combined once, 16 bytes per load,
//     where there are no windows while its first pieces are in flight;
//   - the grid fills the GPU once (map_grid in ops/pieces.py), and a thread strides over the map: rows first, first + step, ...;
//   - the windows of a map are counted by additions. A division by sizes that are known at run time costs as much as
//     everything else that is done to a piece.
//
// tests/test_norm_relu.py counts the loads before the first use in the machine code.
#pragma once
#include "piece.cuh"
#include "windows.cuh"

#define LOADS 4
#define MAP_THREADS 256

// What a thread handles of a (rows, c) matrix: one piece of the channels, of the rows first, first + step, ...
//
//   for (ThreadSlice slice(c); slice.exists(c); slice.next())
//
// Neighbouring threads have neighbouring pieces. Any one-dimensional grid covers the matrix. Where a row has more pieces
// than there are threads, a thread takes several slices; the threads beyond the last whole row of pieces have none.
// Nobody has one where c is no multiple of a piece, which ops/pieces.py refuses.
struct ThreadSlice {
    int64 threads, channel, first, step;
    __device__ explicit ThreadSlice(int c) : threads((int64)gridDim.x * blockDim.x) {
        const int64 index = (int64)blockIdx.x * blockDim.x + threadIdx.x, pieces = c < PIECE ? 1 : c / PIECE;
        channel = index % pieces * PIECE;
        first = index / pieces;
        step = threads < pieces ? 1 : threads / pieces;
    }
    __device__ bool exists(int c) const { return c % PIECE == 0 && channel < c && first < step; }
    __device__ void next() { channel += threads * PIECE; }
    // use(i, load(i)) for the elements i with which its pieces begin, in_flight.cuh's way.
    template <class Load, class Use, class Prepare>
    __device__ void for_each_row(int64 rows, int c, Load load, Use use, Prepare prepare) const {
#if defined(__CUDA_ARCH__) && \
    __CUDA_ARCH__ >= 1200  // whose compiler would put one of the loads behind what is prepared
        prepare();
        for_each_in_flight<LOADS>(first * c + channel, rows * c, step * c, load, use);
#else
        for_each_in_flight<LOADS>(first * c + channel, rows * c, step * c, load, use, prepare);
#endif
    }
};

// A slice's windows first, first + step, ... of a map (n, h, w): `index`, and its image, row and column without divisions.
struct WindowWalk {
    int64 index, count, step;
    int rows, columns, image, row, column, step_images, step_rows, step_columns;
    __device__ WindowWalk(const ThreadSlice& slice, int n, int h, int w)
        : index(slice.first), step(slice.step), rows((h + 1) / 2), columns((w + 1) / 2) {
        count = (int64)n * rows * columns;
        split(index, image, row, column);
        split(step, step_images, step_rows, step_columns);
    }
    __device__ bool exists() const { return index < count; }
    __device__ void next() {
        index += step;
        column += step_columns;
        row += step_rows;
        image += step_images;
        if (column >= columns) {
            column -= columns;
            ++row;
        }
        if (row >= rows) {
            row -= rows;
            ++image;
        }
    }
    __device__ Window window(int64 channel, int h, int w, int c) const {
        return Window(image, row, column, (int)channel, h, w, c);
    }

  private:
    __device__ void split(int64 windows, int& images, int& lines, int& rest) const {
        const int64 all_lines = windows / columns;
        rest = (int)(windows - all_lines * columns);
        images = (int)(all_lines / rows);
        lines = (int)(all_lines - (int64)images * rows);
    }
};

// The pieces of a window. A position outside of the map is answered by the first one, which no pool prefers to itself.
struct WindowPieces {
    Piece at[4];
    __device__ WindowPieces(const storage_t* map, const Window& window, int w, int c) {
#pragma unroll
        for (int code = 0; code < 4; ++code)
            at[code] = load_piece_here(map + window.at(window.holds(code) ? code : 0, w, c));
    }
};
