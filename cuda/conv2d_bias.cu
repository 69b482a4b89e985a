// The gradient of a convolution's bias: dbias[o] = sum of dy over all pixels; dy seen as (rows, o).
//
// Two launches: every chunk of rows makes a partial sum, and the partials of a channel are added by lanes, as a binary tree.
// The bias itself is added in the epilogue of the convolutions. Threads: common/columns.cuh; 8 rows of a thread, and all partials
// of a lane, are in flight at once.
// Element types: float32, float64, bfloat16.
#include "common/columns.cuh"
#include "common/reduce.cuh"

#define MERGE_CHANNELS 8
#define MERGE_LANES 64

// Launch: grid ((o + 31) / 32, chunks), block (32, 8)
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, 4) conv2d_backward_bias_partial(
    const storage_t* __restrict__ dy,     // (rows, o)
    accumulate_t* __restrict__ partials,  // (chunks, o)
    int64 rows, int o, int chunks, int64 rows_per_chunk) {
    SHARED_ARRAY(accumulate_t, lanes, [ROW_LANES][COLUMN_LANES]);
    const ColumnSlice slice(rows, rows_per_chunk);
    accumulate_t sum = 0;
    slice.for_each<8>(o, [&](int64 i) { return load_here(dy + i); }, [&](int64, accumulate_t value) { sum += value; });
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || slice.channel >= o) return;
    for (int lane = 1; lane < ROW_LANES; ++lane) sum += lanes[lane][threadIdx.x];
    partials[(int64)blockIdx.y * o + slice.channel] = sum;
}

// Launch: grid (o + 7) / 8, block (8, 64)
extern "C" __global__ void __launch_bounds__(MERGE_CHANNELS* MERGE_LANES, 1) conv2d_backward_bias_merge(
    const accumulate_t* __restrict__ partials,  // (chunks, o)
    accumulate_t* __restrict__ dbias,           // (o)
    int o, int chunks) {
    const int channel = blockIdx.x * MERGE_CHANNELS + threadIdx.x;
    double sums[1] = {0};
    for_each_in_flight<8>(
        (int64)threadIdx.y * o + channel, channel < o ? (int64)chunks * o : 0, (int64)MERGE_LANES * o,
        [&](int64 i) { return load_here(partials + i); }, [&](int64, accumulate_t partial) { sums[0] += partial; });
    block_add_lanes<MERGE_LANES, MERGE_CHANNELS>(sums);
    if (threadIdx.y == 0 && channel < o) dbias[channel] = (accumulate_t)sums[0];
}
