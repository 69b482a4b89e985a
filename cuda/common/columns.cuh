// Work over a (rows, channels) matrix, channels contiguous: the view that batch norm and bias gradients have of NHWC.
//
// Thread mapping: a block is COLUMN_LANES x ROW_LANES threads. threadIdx.x walks channels, so that neighbouring threads
// read neighbouring addresses; the ROW_LANES threads of one channel take every ROW_LANES-th row. blockIdx.x picks the
// group of channels, blockIdx.y the chunk of rows. Chunk sizes depend on the shape alone, so sums do not depend on the GPU.
#pragma once
#include "in_flight.cuh"

#define COLUMN_LANES 32
#define ROW_LANES 8
#define COLUMN_THREADS (COLUMN_LANES * ROW_LANES)

struct ColumnSlice {
    int channel;
    int64 first_row, end_row;  // rows of this thread: first_row, first_row + ROW_LANES, ... < end_row
    __device__ ColumnSlice(int64 rows, int64 rows_per_chunk) {
        channel = blockIdx.x * COLUMN_LANES + threadIdx.x;
        const int64 chunk_begin = blockIdx.y * rows_per_chunk;
        first_row = chunk_begin + threadIdx.y;
        end_row = chunk_begin + rows_per_chunk < rows ? chunk_begin + rows_per_chunk : rows;
    }
    // use(i, load(i)) for the elements i of its rows, in_flight.cuh's way; not for a channel that there is not.
    template <int LOADS, class Load, class Use>
    __device__ void for_each(int c, Load load, Use use) const {
        for_each_in_flight<LOADS>(
            first_row * c + channel, channel < c ? end_row * c : 0, (int64)ROW_LANES * c, load, use);
    }
};
