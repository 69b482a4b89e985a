// The Euclidean length of all gradients of a model together, and the factor that clips it.
//
//   norm  = sqrt(sum of g^2 over every element of every gradient)
//   scale = largest / norm where norm > largest, else 1     (clipping by global norm, arXiv 1211.5063; sgd.cu applies it)
//   scale = NaN             from the first norm on that is not finite: the steps after it change nothing (sgd.cu)
//
// A table of addresses takes the place of array arguments: addresses[p] is the gradient of parameter p. Gradients are cut
// into chunks; block b of the first launch adds up elements chunk_start[b] ... of gradient chunk_parameter[b]. In the
// second launch one warp per parameter adds its chunks, and then the block its parameters, both as trees: the order
// depends on the shapes alone. All sums are in double, where no square of a float overflows or vanishes. A NaN or an
// infinity anywhere makes the norm one.
#include "common/in_flight.cuh"
#include "common/reduce.cuh"
#include "common/warp.cuh"

#define THREADS 256
#define MERGE_THREADS 1024

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

// Launch: grid 1, block MERGE_THREADS
extern "C" __global__ void __launch_bounds__(MERGE_THREADS, 1) gradient_norm_merge(
    const double* __restrict__ partials,  // (chunks)
    const int* __restrict__ first_chunk,  // (parameters + 1)
    double* __restrict__ squares,         // (parameters)
    double* __restrict__ norm,            // (1)
    double* __restrict__ scale,           // (1), in and out
    int parameters, int chunks, double largest) {
    double total = 0;  // of the parameters of this warp, in its first lane
    for (int parameter = warp_index(); parameter < parameters; parameter += MERGE_THREADS / WARP) {
        double sum = 0;
        for_each_in_flight<4>(
            first_chunk[parameter] + warp_lane(), first_chunk[parameter + 1], WARP,
            [&](int64 chunk) { return load_here(partials + chunk); }, [&](int64, double partial) { sum += partial; });
        for (int half = WARP / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, half);
        if (warp_lane() > 0) continue;
        squares[parameter] = sum;
        total += sum;
    }
    total = block_sum<MERGE_THREADS>(total);
    if (threadIdx.x != 0) return;
    const double length = sqrt(total);
    norm[0] = length;
    if (scale[0] != scale[0]) return;  // an earlier step has failed
    scale[0] = !isfinite(length) ? length - length : length > largest ? largest / length : 1.0;
}
