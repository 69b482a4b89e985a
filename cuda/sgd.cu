// Stochastic gradient descent with momentum, over all parameters of a model in one launch.
//
//   m = momentum m + scale g + decay w;   w = w - rate lr m    (PyTorch's form; decay and rate per parameter)
//
// A table of addresses takes the place of array arguments: addresses[p] = {w, g, m} of parameter p. Parameters are cut
// into chunks; block b works on elements chunk_start[b] ... of parameter chunk_parameter[b]. The learning rate and
// the scale of the gradients (gradient_norm.cu) lie in device memory: they change between launches of a captured graph.
// Threads: elements of a chunk, stride blockDim.x. Element-wise: no order to depend on.
#include "common/types.cuh"

// Launch: by its op only, because `addresses` holds pointers
extern "C" __global__ void sgd_step(
    const uint64* __restrict__ addresses,     // (parameters, 3)
    const int64* __restrict__ sizes,          // (parameters)
    const double* __restrict__ rates,         // (parameters)
    const double* __restrict__ decays,        // (parameters)
    const int* __restrict__ chunk_parameter,  // (chunks)
    const int64* __restrict__ chunk_start,    // (chunks)
    const double* __restrict__ lr,            // (1)
    const double* __restrict__ scale,         // (1)
    int parameters, int chunks, int64 chunk_size, double momentum) {
    const int parameter = chunk_parameter[blockIdx.x];
    storage_t* const w = (storage_t*)addresses[parameter * 3 + 0];
    const storage_t* const g = (const storage_t*)addresses[parameter * 3 + 1];
    storage_t* const m = (storage_t*)addresses[parameter * 3 + 2];
    const int64 begin = chunk_start[blockIdx.x], size = sizes[parameter];
    const int64 end = begin + chunk_size < size ? begin + chunk_size : size;
    const accumulate_t rate = (accumulate_t)(lr[0] * rates[parameter]), decay = (accumulate_t)decays[parameter];
    const accumulate_t keep = (accumulate_t)momentum, factor = (accumulate_t)scale[0];
    for (int64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const accumulate_t value = w[i], velocity = keep * m[i] + (factor * g[i] + decay * value);
        m[i] = velocity;
        w[i] = value - rate * velocity;
    }
}
