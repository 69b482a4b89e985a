// The gradient of a convolution's bias: dbias[o] = sum of dy over all pixels; dy seen as (rows, o).
//
// Two launches: every chunk of rows makes a partial sum, one thread a channel adds the partials in the order of the
// chunks. The bias itself is added in the epilogue of the convolutions. Threads: common/columns.cuh.
// Element types: float32, float64, bfloat16.
#include "common/columns.cuh"

// Launch: grid ((o + 31) / 32, chunks), block (32, 8)
extern "C" __global__ void conv2d_backward_bias_partial(
    const storage_t* __restrict__ dy,     // (rows, o)
    accumulate_t* __restrict__ partials,  // (chunks, o)
    int64 rows, int o, int chunks, int64 rows_per_chunk) {
    SHARED_ARRAY(accumulate_t, lanes, [ROW_LANES][COLUMN_LANES]);
    const ColumnSlice slice(rows, rows_per_chunk);
    accumulate_t sum = 0;
    if (slice.channel < o)
        for (int64 row = slice.first_row; row < slice.end_row; row += ROW_LANES)
            sum += (accumulate_t)dy[row * o + slice.channel];
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || slice.channel >= o) return;
    for (int lane = 1; lane < ROW_LANES; ++lane) sum += lanes[lane][threadIdx.x];
    partials[(int64)blockIdx.y * o + slice.channel] = sum;
}

extern "C" __global__ void conv2d_backward_bias_merge(
    const accumulate_t* __restrict__ partials,  // (chunks, o)
    accumulate_t* __restrict__ dbias,           // (o)
    int o, int chunks) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= o) return;
    accumulate_t sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += partials[(int64)chunk * o + channel];
    dbias[channel] = sum;
}
