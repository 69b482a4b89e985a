// The sum of the partial results that every rung's wgrad leaves of its chunks of pixels, added in their order.
// Element types: float32, float64, bfloat16.
//
//   dweight[i] = sum over chunks of partials[chunk][i]
//
// Blocks are (256 / lanes, lanes): where a few results have many chunks, their sums are made by lanes, one for every
// lanes-th chunk, which are added in their order. A thread has 16 bytes of results, and 2, 4 or 8 chunks of them in flight
// (common/in_flight.cuh): as many as it has, since a load too many costs as much as another.
#include "common/in_flight.cuh"

#define MERGE_THREADS 256

__device__ inline void add_to(accumulate_t& sum, const accumulate_t& partial) { sum += partial; }
__device__ inline void add_to(Vector16<accumulate_t>& sum, const Vector16<accumulate_t>& partial) {
#pragma unroll
    for (int i = 0; i < 16 / (int)sizeof(accumulate_t); ++i) sum.of[i] += partial.of[i];
}

template <int LOADS, class T>
__device__ __forceinline__ void add_chunks(T& sum, const T* partials, int64 i, int64 count, int chunks) {
    for_each_in_flight<LOADS>(
        threadIdx.y * count + i, i < count ? chunks * count : 0, blockDim.y * count,
        [&](int64 place) { return load_here(partials + place); },
        [&](int64, const T& partial) { add_to(sum, partial); });
}

template <class T>
__device__ void merge(const T* partials, T* dweight, int64 count, int chunks) {
    SHARED_ARRAY(T, lanes, [MERGE_THREADS]);
    for (int64 first = (int64)blockIdx.x * blockDim.x; first < count; first += (int64)gridDim.x * blockDim.x) {
        const int64 i = first + threadIdx.x;
        T sum = {};
        if (chunks <= 2 * (int)blockDim.y)
            add_chunks<2>(sum, partials, i, count, chunks);
        else if (chunks <= 4 * (int)blockDim.y)
            add_chunks<4>(sum, partials, i, count, chunks);
        else
            add_chunks<8>(sum, partials, i, count, chunks);
        if (blockDim.y > 1) {
            lanes[threadIdx.y * blockDim.x + threadIdx.x] = sum;
            __syncthreads();
            if (threadIdx.y == 0)
                for (int lane = 1; lane < (int)blockDim.y; ++lane) add_to(sum, lanes[lane * blockDim.x + threadIdx.x]);
            __syncthreads();  // the next results write `lanes` again
        }
        if (i < count && threadIdx.y == 0) dweight[i] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(MERGE_THREADS, 4) conv2d_backward_weight_merge(
    const accumulate_t* __restrict__ partials,  // (chunks, count)
    accumulate_t* __restrict__ dweight,         // (count)
    int64 count, int chunks) {
    typedef Vector16<accumulate_t> Group;
    if (in_vectors(partials, count) && in_vectors(dweight, count))
        merge((const Group*)partials, (Group*)dweight, count / (16 / (int)sizeof(accumulate_t)), chunks);
    else
        merge(partials, dweight, count, chunks);
}
