// The gradient of a convolution's bias: dbias[o] = sum of dy over all pixels; dy seen as (rows, o).
//
// Two launches: every chunk of rows makes a partial sum, one thread a channel adds the partials in the order of the
// chunks. The bias itself is added in the epilogue of the convolutions. Threads: common/columns.cuh; 8 rows, or 16 partials, of
// a thread are under way at once: of 24 bfloat16 channels 16 KB on a multiprocessor, where it was 2 (not measured).
// Element types: float32, float64, bfloat16.
#include "common/columns.cuh"

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

extern "C" __global__ void conv2d_backward_bias_merge(
    const accumulate_t* __restrict__ partials,  // (chunks, o)
    accumulate_t* __restrict__ dbias,           // (o)
    int o, int chunks) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= o) return;
    accumulate_t sum = 0;
    for_each_in_flight<16>(
        channel, (int64)chunks * o, o, [&](int64 i) { return load_here(partials + i); },
        [&](int64, accumulate_t partial) { sum += partial; });
    dbias[channel] = sum;
}
