// Arrays in shared memory: writes outside, reads of what nobody wrote, sizes given at the launch.
#include "common/types.cuh"

extern "C" __global__ void write_shared(
    int* out,  // (1)
    int first_index, int second_index) {
    SHARED_ARRAY(uint8, first, [5]);
    SHARED_ARRAY(storage_t, second, [4][4]);
    first[first_index] = 1;
    (&second[0][0])[second_index] = 1;
    __syncthreads();
    out[0] = 1;
}

extern "C" __global__ void write_dynamic(
    int* out,  // (1)
    int index) {
    SHARED_DYNAMIC(storage_t, scratch);
    scratch[index] = 1;
    out[0] = 1;
}

// Block 0 writes everything; the blocks after it write nothing and must not see what it left behind.
extern "C" __global__ void read_shared(
    storage_t* values,  // (blocks, 32)
    int* integers,      // (blocks, 32)
    int blocks) {
    SHARED_ARRAY(storage_t, tile, [32]);
    SHARED_ARRAY(int, numbers, [32]);
    if (blockIdx.x == 0) tile[threadIdx.x] = numbers[threadIdx.x] = threadIdx.x;
    __syncthreads();
    values[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];
    integers[blockIdx.x * 32 + threadIdx.x] = numbers[threadIdx.x];
}

extern "C" __global__ void reverse_dynamic(
    const storage_t* x,  // (blocks, threads)
    storage_t* y,        // (blocks, threads)
    int blocks, int threads) {
    SHARED_DYNAMIC(storage_t, scratch);
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    scratch[thread] = x[blockIdx.x * threads + thread];
    __syncthreads();
    y[blockIdx.x * threads + thread] = scratch[threads - 1 - thread];
}

// 80,000 bytes are more than a GPU grants without being asked; 400,000 are more than any has.
extern "C" __global__ void much_shared(
    int* out  // (1)
) {
    SHARED_ARRAY(float, tile, [20000]);
    tile[threadIdx.x] = 1;
    __syncthreads();
    out[0] = (int)tile[0];
}

extern "C" __global__ void too_much_shared(
    int* out  // (1)
) {
    SHARED_ARRAY(float, small, [4]);
    SHARED_ARRAY(float, huge, [100000]);
    small[0] = huge[99999] = 1;
    __syncthreads();
    out[0] = 1;
}
