// Work over a (rows, channels) matrix, channels contiguous: the view that batch norm and bias gradients have of NHWC.
//
// Thread mapping: a block is COLUMN_LANES x ROW_LANES threads. threadIdx.x walks channels, so that neighbouring threads
// read neighbouring addresses; the ROW_LANES threads of one channel take every ROW_LANES-th row. blockIdx.x picks the
// group of channels, blockIdx.y the chunk of rows. Chunk sizes depend on the shape alone, so sums do not depend on the GPU.
#pragma once
#include "types.cuh"

#define COLUMN_LANES 32
#define ROW_LANES 8

struct ColumnSlice {
    int channel;
    int64 first_row, end_row;  // rows of this thread: first_row, first_row + ROW_LANES, ... < end_row
    __device__ ColumnSlice(int64 rows, int64 rows_per_chunk) {
        channel = blockIdx.x * COLUMN_LANES + threadIdx.x;
        const int64 chunk_begin = blockIdx.y * rows_per_chunk;
        first_row = chunk_begin + threadIdx.y;
        end_row = chunk_begin + rows_per_chunk < rows ? chunk_begin + rows_per_chunk : rows;
    }
};
