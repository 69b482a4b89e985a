// Who runs where: every thread writes its own indices.
#include "common/types.cuh"

__device__ void write_indices(int* out) {
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    int* const row = out + (block * threads + thread) * 12;
    row[0] += blockIdx.x, row[1] += blockIdx.y, row[2] += blockIdx.z;
    row[3] += threadIdx.x, row[4] += threadIdx.y, row[5] += threadIdx.z;
    row[6] += gridDim.x, row[7] += gridDim.y, row[8] += gridDim.z;
    row[9] += blockDim.x, row[10] += blockDim.y, row[11] += blockDim.z;
}

extern "C" __global__ void indices_flat(
    int* out,  // (blocks, threads, 12)
    int blocks, int threads) {
    write_indices(out);
}

extern "C" __global__ void indices_fibers(
    int* out,  // (blocks, threads, 12)
    int blocks, int threads) {
    __syncthreads();
    write_indices(out);
    __syncthreads();
}

// Every thread takes a number at each of two turns: the numbers show the order in which threads ran.
extern "C" __global__ void tickets(
    int* counter,  // (1)
    int* numbers,  // (2, threads)
    int threads) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    numbers[thread] = atomicAdd(counter, 1);
    __syncthreads();
    numbers[threads + thread] = atomicAdd(counter, 1);
}

extern "C" __global__ void count_in_bins(
    uint64* counts,  // (bins)
    int bins) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&counts[thread % bins], (uint64)1);
}

// One value of each kind, so that a value that travels with the wrong width or sign shows.
extern "C" __global__ void scalars(
    double* out,                           // (8)
    const storage_t* OPTIONAL may_be_null, // (1)
    char a, uint8 b, short c, int d, unsigned e, int64 f, float g, double h) {
    out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = e, out[5] = (double)f, out[6] = g;
    out[7] = may_be_null ? h + may_be_null[0] : h;
}
