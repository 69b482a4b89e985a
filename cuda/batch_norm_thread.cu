// Batch norm in training, a rung that teaches: one thread per channel, the definition in two passes.
//
//   mean = sum x / rows;  var = sum (x - mean)^2 / rows;  inv_std = 1 / sqrt(var + eps)
//   y = weight (x - mean) inv_std + bias;  running statistics as in batch_norm.cu
//
// It reads x three times and writes y: four maps of traffic, where two are the least. Neighbouring threads have neighbouring
// channels, so every access is coalesced. What is left undone: 64 channels are two warps, and each waits for memory row
// after row, where a GPU wants thousands of warps to have loads in flight (batch_norm_block.cu: one block per channel).
//
// Threads: one channel each. Sums in double, in the order of the rows: the same bits every time.
#include "common/types.cuh"

#define THREADS 32

// Launch: grid (c + THREADS - 1) / THREADS, block THREADS
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_training_forward_thread(
    const storage_t* __restrict__ x,       // (rows, c)
    const storage_t* __restrict__ weight,  // (c)
    const storage_t* __restrict__ bias,    // (c)
    storage_t* __restrict__ y,             // (rows, c)
    accumulate_t* __restrict__ mean,       // (c)
    accumulate_t* __restrict__ inv_std,    // (c)
    storage_t* __restrict__ running_mean,  // (c)
    storage_t* __restrict__ running_var,   // (c)
    int64 rows, int c, double eps, double momentum) {
    const int channel = blockIdx.x * THREADS + threadIdx.x;
    if (channel >= c) return;
    double sum = 0, squares = 0;
    for (int64 row = 0; row < rows; ++row) sum += x[row * c + channel];
    const double centre = sum / rows;
    for (int64 row = 0; row < rows; ++row) {
        const double distance = x[row * c + channel] - centre;
        squares += distance * distance;
    }
    const double scale = 1 / sqrt(squares / rows + eps);
    for (int64 row = 0; row < rows; ++row)
        y[row * c + channel] = (x[row * c + channel] - centre) * scale * weight[channel] + bias[channel];

    mean[channel] = centre;
    inv_std[channel] = scale;
    running_mean[channel] = (1 - momentum) * running_mean[channel] + momentum * centre;
    running_var[channel] = (1 - momentum) * running_var[channel] + momentum * (squares / (rows - 1));
}
