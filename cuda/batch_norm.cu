// Batch normalisation over (n, h, w) for every channel (Ioffe and Szegedy, arXiv 1502.03167), x seen as (rows, c).
//
//   training   mean, var over the rows;  inv_std = 1 / sqrt(var + eps);  xhat = (x - mean) inv_std;  y = weight xhat + bias
//              running <- (1 - momentum) running + momentum (mean, var rows / (rows - 1))
//   evaluation the same with the running mean and variance
//   backward   dbias = sum dy;  dweight = sum dy xhat
//              training:   dx = weight inv_std (dy - dbias / rows - xhat dweight / rows)
//                          (mean and inv_std depend on every row: d mean = 1/rows, d inv_std = -inv_std^2 xhat / rows)
//              evaluation: dx = weight inv_std dy
//
// Sums in three launches: every chunk of rows makes a partial result, one thread per channel merges the partials in the
// order of the chunks, and an element-wise pass applies them. No atomics; chunks depend on the shape alone.
//
// Of several ranks that share a batch each merges its chunks to one (count, mean, M2), and every one of them merges those
// of all ranks in their order; so with the sums of backward. The mean of dy is then over the rows of all ranks.
//
// Statistics never come from E[x^2] - E[x]^2, which cancels: a thread sums distances from its first value, and the
// results are merged as (count, mean, M2) (Chan, Golub, LeVeque 1983). All sums are carried in double: that hides behind
// the memory traffic, and a channel's error in the last bit would reach every pixel of it, and there turn a near tie of
// a max-pool into another position.
//
// Threads: common/columns.cuh; the merges take one thread per channel. 8 loads of a thread are in flight at once, 64 KB of
// float32 for 2048 threads on a multiprocessor, where 29 are needed (common/in_flight.cuh).
#include "common/columns.cuh"
#include "common/moments.cuh"

// Launch: grid ((c + 31) / 32, chunks), block (32, 8)
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, 4) batch_norm_partial_statistics(
    const storage_t* __restrict__ x,  // (rows, c)
    double* __restrict__ partials,    // (chunks, 2, c): mean, M2
    int64 rows, int c, int chunks, int64 rows_per_chunk) {
    SHARED_ARRAY(Moments, lanes, [ROW_LANES][COLUMN_LANES]);
    const ColumnSlice slice(rows, rows_per_chunk);
    const int64 end = slice.channel < c ? slice.end_row : 0;  // no rows beyond the last channel
    lanes[threadIdx.y][threadIdx.x] = moments_of(x, slice.first_row, end, ROW_LANES, slice.channel, c);
    __syncthreads();
    if (threadIdx.y != 0 || slice.channel >= c) return;
    Moments moments = lanes[0][threadIdx.x];
    for (int lane = 1; lane < ROW_LANES; ++lane) moments.merge(lanes[lane][threadIdx.x]);
    double* const partial = partials + (int64)blockIdx.y * 2 * c + slice.channel;
    partial[0] = moments.mean;
    partial[c] = moments.m2;
}

// What is loaded: of two maps, and of the partial results of a channel.
__device__ inline auto of_both(const storage_t* x, const storage_t* dy) {
    return [=](int64 i) { return Two<storage_t>{load_here(x + i), load_here(dy + i)}; };
}
__device__ inline auto of_chunk(const double* partials, int c, int channel) {
    return [=](int64 chunk) {
        const double* const partial = partials + chunk * 2 * c + channel;
        return Two<double>{load_here(partial), load_here(partial + c)};
    };
}

__device__ inline Moments merged_chunks(
    const double* partials, int channel, int64 rows, int c, int chunks, int64 rows_per_chunk) {
    Moments total = {0, 0, 0};
    for_each_in_flight<8>(0, chunks, 1, of_chunk(partials, c, channel), [&](int64 chunk, const Two<double>& partial) {
        const int64 count = min(rows - chunk * rows_per_chunk, rows_per_chunk);
        total.merge({(double)count, partial.first, partial.second});
    });
    return total;
}

__device__ inline void store_statistics(
    const Moments& total, int channel, accumulate_t* mean, accumulate_t* inv_std, storage_t* running_mean,
    storage_t* running_var, double eps, double momentum) {
    mean[channel] = total.mean;
    inv_std[channel] = 1 / sqrt(total.m2 / total.count + eps);
    running_mean[channel] = (1 - momentum) * running_mean[channel] + momentum * total.mean;
    running_var[channel] = (1 - momentum) * running_var[channel] + momentum * (total.m2 / (total.count - 1));
}

extern "C" __global__ void batch_norm_merge_statistics(
    const double* __restrict__ partials,   // (chunks, 2, c)
    accumulate_t* __restrict__ mean,       // (c)
    accumulate_t* __restrict__ inv_std,    // (c)
    storage_t* __restrict__ running_mean,  // (c)
    storage_t* __restrict__ running_var,   // (c)
    int64 rows, int c, int chunks, int64 rows_per_chunk, double eps, double momentum) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    const Moments total = merged_chunks(partials, channel, rows, c, chunks, rows_per_chunk);
    store_statistics(total, channel, mean, inv_std, running_mean, running_var, eps, momentum);
}

extern "C" __global__ void batch_norm_moments(
    const double* __restrict__ partials,  // (chunks, 2, c)
    double* __restrict__ moments,         // (3, c): rows, mean, M2
    int64 rows, int c, int chunks, int64 rows_per_chunk) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    const Moments total = merged_chunks(partials, channel, rows, c, chunks, rows_per_chunk);
    moments[channel] = total.count;
    moments[c + channel] = total.mean;
    moments[2 * c + channel] = total.m2;
}

extern "C" __global__ void batch_norm_merge_ranks(
    const double* __restrict__ moments,    // (ranks, 3, c)
    accumulate_t* __restrict__ mean,       // (c)
    accumulate_t* __restrict__ inv_std,    // (c)
    storage_t* __restrict__ running_mean,  // (c)
    storage_t* __restrict__ running_var,   // (c)
    int c, int ranks, double eps, double momentum) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    Moments total = {0, 0, 0};
    for (int rank = 0; rank < ranks; ++rank) {
        const double* const own = moments + (int64)rank * 3 * c + channel;
        total.merge({own[0], own[c], own[2 * c]});
    }
    store_statistics(total, channel, mean, inv_std, running_mean, running_var, eps, momentum);
}

extern "C" __global__ void batch_norm_evaluation_statistics(
    const storage_t* __restrict__ running_mean,  // (c)
    const storage_t* __restrict__ running_var,   // (c)
    accumulate_t* __restrict__ mean,             // (c)
    accumulate_t* __restrict__ inv_std,          // (c)
    int c, double eps) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    mean[channel] = running_mean[channel];
    inv_std[channel] = 1 / sqrt(running_var[channel] + eps);
}

// Launch: grid ((c + 31) / 32, (rows + rows_per_chunk - 1) / rows_per_chunk), block (32, 8)
extern "C" __global__ void batch_norm_forward(
    const storage_t* __restrict__ x,           // (rows, c)
    const accumulate_t* __restrict__ mean,     // (c)
    const accumulate_t* __restrict__ inv_std,  // (c)
    const storage_t* __restrict__ weight,      // (c)
    const storage_t* __restrict__ bias,        // (c)
    storage_t* __restrict__ y,                 // (rows, c)
    int64 rows, int c, int64 rows_per_chunk) {
    const ColumnSlice slice(rows, rows_per_chunk);
    if (slice.channel >= c) return;
    const accumulate_t shift = mean[slice.channel], scale = inv_std[slice.channel] * weight[slice.channel];
    const accumulate_t offset = bias[slice.channel];
    slice.for_each<8>(
        c, [&](int64 i) { return load_here(x + i); },
        [&](int64 i, storage_t value) { y[i] = (value - shift) * scale + offset; });
}

// Launch: grid ((c + 31) / 32, chunks), block (32, 8)
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, 4) batch_norm_backward_partial(
    const storage_t* __restrict__ x,           // (rows, c)
    const storage_t* __restrict__ dy,          // (rows, c)
    const accumulate_t* __restrict__ mean,     // (c)
    const accumulate_t* __restrict__ inv_std,  // (c)
    double* __restrict__ partials,             // (chunks, 2, c): sum dy, sum dy xhat
    int64 rows, int c, int chunks, int64 rows_per_chunk) {
    SHARED_ARRAY(double, lanes, [2][ROW_LANES][COLUMN_LANES]);
    const ColumnSlice slice(rows, rows_per_chunk);
    double sum_dy = 0, sum_dy_xhat = 0;
    if (slice.channel < c) {
        const accumulate_t shift = mean[slice.channel], scale = inv_std[slice.channel];
        slice.for_each<4>(c, of_both(x, dy), [&](int64, const Two<storage_t>& both) {
            sum_dy += both.second;
            sum_dy_xhat += (double)both.second * ((both.first - shift) * scale);
        });
    }
    lanes[0][threadIdx.y][threadIdx.x] = sum_dy;
    lanes[1][threadIdx.y][threadIdx.x] = sum_dy_xhat;
    __syncthreads();
    if (threadIdx.y >= 2 || slice.channel >= c) return;
    double total = 0;  // row lane 0 adds up dy, row lane 1 dy xhat
    for (int lane = 0; lane < ROW_LANES; ++lane) total += lanes[threadIdx.y][lane][threadIdx.x];
    partials[((int64)blockIdx.y * 2 + threadIdx.y) * c + slice.channel] = total;
}

extern "C" __global__ void batch_norm_backward_merge(
    const double* __restrict__ partials,  // (chunks, 2, c)
    storage_t* __restrict__ dweight,      // (c)
    storage_t* __restrict__ dbias,        // (c)
    double* __restrict__ OPTIONAL sums,   // (2, c): sum dy, sum dy xhat, for the other ranks
    int c, int chunks) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    double sum_dy = 0, sum_dy_xhat = 0;
    for_each_in_flight<8>(0, chunks, 1, of_chunk(partials, c, channel), [&](int64, const Two<double>& partial) {
        sum_dy += partial.first;
        sum_dy_xhat += partial.second;
    });
    dweight[channel] = sum_dy_xhat;
    dbias[channel] = sum_dy;
    if (sums) {
        sums[channel] = sum_dy;
        sums[c + channel] = sum_dy_xhat;
    }
}

// What batch_norm_backward, which divides by its own rows, is to be given for the means over all ranks.
extern "C" __global__ void batch_norm_backward_merge_ranks(
    const double* __restrict__ sums,     // (ranks, 2, c)
    const double* __restrict__ moments,  // (ranks, 3, c)
    storage_t* __restrict__ dweight,     // (c)
    storage_t* __restrict__ dbias,       // (c)
    int64 rows, int c, int ranks) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    double sum_dy = 0, sum_dy_xhat = 0, count = 0;
    for (int rank = 0; rank < ranks; ++rank) {
        sum_dy += sums[(int64)rank * 2 * c + channel];
        sum_dy_xhat += sums[((int64)rank * 2 + 1) * c + channel];
        count += moments[(int64)rank * 3 * c + channel];
    }
    dweight[channel] = sum_dy_xhat * (rows / count);
    dbias[channel] = sum_dy * (rows / count);
}

// Launch: grid ((c + 31) / 32, (rows + rows_per_chunk - 1) / rows_per_chunk), block (32, 8)
extern "C" __global__ void batch_norm_backward(
    const storage_t* __restrict__ x,           // (rows, c)
    const storage_t* __restrict__ dy,          // (rows, c)
    const accumulate_t* __restrict__ mean,     // (c)
    const accumulate_t* __restrict__ inv_std,  // (c)
    const storage_t* __restrict__ weight,      // (c)
    const storage_t* __restrict__ dweight,     // (c)
    const storage_t* __restrict__ dbias,       // (c)
    storage_t* __restrict__ dx,                // (rows, c)
    int64 rows, int c, int64 rows_per_chunk, int training) {
    const ColumnSlice slice(rows, rows_per_chunk);
    if (slice.channel >= c) return;
    const accumulate_t shift = mean[slice.channel], scale = inv_std[slice.channel];
    const accumulate_t gain = weight[slice.channel] * scale;
    const accumulate_t mean_dy = training ? (accumulate_t)dbias[slice.channel] / rows : 0;
    const accumulate_t mean_dy_xhat = training ? (accumulate_t)dweight[slice.channel] / rows : 0;
    slice.for_each<4>(c, of_both(x, dy), [&](int64 i, const Two<storage_t>& both) {
        const accumulate_t xhat = (both.first - shift) * scale;
        dx[i] = gain * (both.second - mean_dy - xhat * mean_dy_xhat);
    });
}
