// Stochastic gradient descent with momentum, over all parameters of a model in one launch.
//
//   m = momentum m + scale g + decay w;   w = w - rate lr m    (PyTorch's form; decay and rate per parameter)
//
// A table of addresses takes the place of array arguments: addresses[p] = {w, g, m} of parameter p. Parameters are cut
// into chunks; block b works on elements chunk_start[b] ... of parameter chunk_parameter[b]. The learning rate and
// the scale of the gradients (gradient_norm.cu) lie in device memory: they change between launches of a captured graph.
// Threads: elements of a chunk, stride blockDim.x, four at a time. Element-wise: no order to depend on.
//
// 20 bytes move for each float32 element, 12 of them read: four elements of 1536 resident threads are 74 KB in flight on a
// multiprocessor, where 29 are needed (common/in_flight.cuh).
//
// A scale of NaN says that the gradients are not finite. Then nothing moves, and `keep_finite` takes back what the
// forward pass has done to the running statistics: without a look from the host a failed step leaves no trace.
#include "common/in_flight.cuh"

struct Element {
    storage_t w, g, m;
};

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
    if (scale[0] != scale[0]) return;
    const int parameter = chunk_parameter[blockIdx.x];
    storage_t* const w = (storage_t*)addresses[parameter * 3 + 0];
    const storage_t* const g = (const storage_t*)addresses[parameter * 3 + 1];
    storage_t* const m = (storage_t*)addresses[parameter * 3 + 2];
    const int64 begin = chunk_start[blockIdx.x], end = min(begin + chunk_size, sizes[parameter]);
    const accumulate_t rate = (accumulate_t)(lr[0] * rates[parameter]), decay = (accumulate_t)decays[parameter];
    const accumulate_t keep = (accumulate_t)momentum, factor = (accumulate_t)scale[0];
    auto load = [&](int64 i) { return Element{load_here(w + i), load_here(g + i), load_here(m + i)}; };
    for_each_in_flight<4>(begin + threadIdx.x, end, blockDim.x, load, [&](int64 i, const Element& old) {
        const accumulate_t value = old.w, velocity = keep * old.m + (factor * old.g + decay * value);
        m[i] = velocity;
        w[i] = value - rate * velocity;
    });
}

// kept = array where the step went well, else array = kept. addresses[p] = {array, kept}.
// Launch: by its op only, because `addresses` holds pointers
extern "C" __global__ void keep_finite(
    const uint64* __restrict__ addresses,     // (arrays, 2)
    const int64* __restrict__ sizes,          // (arrays)
    const int* __restrict__ chunk_parameter,  // (chunks)
    const int64* __restrict__ chunk_start,    // (chunks)
    const double* __restrict__ scale,         // (1)
    int arrays, int chunks, int64 chunk_size) {
    const int index = chunk_parameter[blockIdx.x];
    storage_t* const array = (storage_t*)addresses[index * 2 + 0];
    storage_t* const kept = (storage_t*)addresses[index * 2 + 1];
    const int64 begin = chunk_start[blockIdx.x], end = min(begin + chunk_size, sizes[index]);
    const bool failed = scale[0] != scale[0];
    const storage_t* const from = failed ? kept : array;
    storage_t* const to = failed ? array : kept;
    for_each_in_flight<8>(
        begin + threadIdx.x, end, blockDim.x, [&](int64 i) { return load_here(from + i); },
        [&](int64 i, storage_t value) { to[i] = value; });
}
