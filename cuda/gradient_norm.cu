// The Euclidean length of all gradients of a model together, and the factor that clips it.
//
//   norm  = sqrt(sum of g^2 over every element of every gradient)
//   scale = largest / norm where norm > largest, else 1     (clipping by global norm, arXiv 1211.5063; sgd.cu applies it)
//   scale = NaN             from the first norm on that is not finite: the steps after it change nothing (sgd.cu)
//
// A table of addresses takes the place of array arguments: addresses[p] is the gradient of parameter p. Gradients are cut
// into chunks; block b of the first launch adds up elements chunk_start[b] ... of gradient chunk_parameter[b]. In the
// second launch one thread a parameter adds its chunks in their order, and thread 0 the parameters in theirs: the order
// depends on the shapes alone. All sums are in double, where no square of a float overflows or vanishes. A NaN or an
// infinity anywhere makes the norm one.
#include "common/in_flight.cuh"
#include "common/reduce.cuh"

#define THREADS 256

// Launch: by its op only, because `addresses` holds pointers
extern "C" __global__ void __launch_bounds__(THREADS, 4) gradient_norm_partial(
    const uint64* __restrict__ addresses,     // (parameters)
    const int64* __restrict__ sizes,          // (parameters)
    const int* __restrict__ chunk_parameter,  // (chunks)
    const int64* __restrict__ chunk_start,    // (chunks)
    double* __restrict__ partials,            // (chunks)
    int parameters, int chunks, int64 chunk_size) {
    const int parameter = chunk_parameter[blockIdx.x];
    const storage_t* const g = (const storage_t*)addresses[parameter];
    const int64 begin = chunk_start[blockIdx.x], end = min(begin + chunk_size, sizes[parameter]);
    double sum = 0;
    for_each_in_flight<8>(
        begin + threadIdx.x, end, blockDim.x, [&](int64 i) { return load_here(g + i); },
        [&](int64, storage_t value) { sum += (double)value * (double)value; });
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Launch: grid 1, block THREADS
extern "C" __global__ void __launch_bounds__(THREADS, 1) gradient_norm_merge(
    const double* __restrict__ partials,  // (chunks)
    const int* __restrict__ first_chunk,  // (parameters + 1)
    double* __restrict__ squares,         // (parameters)
    double* __restrict__ norm,            // (1)
    double* __restrict__ scale,           // (1), in and out
    int parameters, int chunks, double largest) {
    for (int parameter = threadIdx.x; parameter < parameters; parameter += blockDim.x) {
        double sum = 0;
        for_each_in_flight<16>(
            first_chunk[parameter], first_chunk[parameter + 1], 1,
            [&](int64 chunk) { return load_here(partials + chunk); }, [&](int64, double partial) { sum += partial; });
        squares[parameter] = sum;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    double total = 0;
    for_each_in_flight<16>(
        0, parameters, 1, [&](int64 parameter) { return load_here(squares + parameter); },
        [&](int64, double square) { total += square; });
    const double length = sqrt(total);
    norm[0] = length;
    if (scale[0] != scale[0]) return;  // an earlier step has failed
    scale[0] = !isfinite(length) ? length - length : length > largest ? largest / length : 1.0;
}
