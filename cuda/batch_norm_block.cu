// Batch norm in training, a rung that teaches: one block per channel, its threads' moments merged as a tree.
//
//   mean, var of a channel as (count, mean, M2) (common/moments.cuh);  y = weight (x - mean) inv_std + bias
//
// Over batch_norm_thread.cu: 256 threads share the rows of a channel, and moments need one pass over x, not two. What is
// left undone: with channels last, the threads of a warp read rows that lie c numbers apart. A sector of 32 bytes is fetched
// for 4 of them, and 7 blocks more, on other multiprocessors, fetch it again (batch_norm.cu: a block for 32 channels of a
// chunk of rows). With channels first (NCHW), where a channel is contiguous, this is how batch norm is often written.
//
// Threads: t takes rows t, t + 256, ... of channel blockIdx.x. Worked index: of 300 rows, thread 5 has rows 5 and 261, and in
// the merge with half = 128 takes in thread 133 (row 133 alone), with half = 64 thread 69, which has taken in 197 by then.
// Determinism: the tree depends on the number of rows alone.
#include "common/moments.cuh"

#define THREADS 256

// At least 4 blocks on a multiprocessor: unasked, the compiler makes room for 5 on sm_100, and registers spill.
// Launch: grid c, block THREADS
extern "C" __global__ void __launch_bounds__(THREADS, 4) batch_norm_training_forward_block(
    const storage_t* __restrict__ x,       // (rows, c)
    const storage_t* __restrict__ weight,  // (c)
    const storage_t* __restrict__ bias,    // (c)
    storage_t* __restrict__ y,             // (rows, c)
    accumulate_t* __restrict__ mean,       // (c)
    accumulate_t* __restrict__ inv_std,    // (c)
    storage_t* __restrict__ running_mean,  // (c)
    storage_t* __restrict__ running_var,   // (c)
    int64 rows, int c, double eps, double momentum) {
    SHARED_ARRAY(Moments, lanes, [THREADS]);
    const int channel = blockIdx.x, lane = threadIdx.x;
    lanes[lane] = moments_of(x, lane, rows, THREADS, channel, c);
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (lane < half) lanes[lane].merge(lanes[lane + half]);
        __syncthreads();
    }
    const Moments all = lanes[0];
    const double scale = 1 / sqrt(all.m2 / rows + eps);
    for (int64 row = lane; row < rows; row += THREADS)
        y[row * c + channel] = (x[row * c + channel] - all.mean) * scale * weight[channel] + bias[channel];
    if (lane != 0) return;
    mean[channel] = all.mean;
    inv_std[channel] = scale;
    running_mean[channel] = (1 - momentum) * running_mean[channel] + momentum * all.mean;
    running_var[channel] = (1 - momentum) * running_var[channel] + momentum * (all.m2 / (rows - 1));
}
