// Threads that write where others write.

// Threads of different blocks write the same element; the last block wins.
extern "C" __global__ void last_block_wins(int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i % n] = blockIdx.x;
}

// Right in every order as long as one thread runs after the other.
extern "C" __global__ void total_racy(const int* x, int* total, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) *total += x[i] + 1;
}

extern "C" __global__ void first_of_block_racy(const int* x, int* total) {
    __shared__ int sum;
    if (threadIdx.x == 0) sum = x[blockIdx.x];
    __syncthreads();
    if (threadIdx.x == 1) total[0] += sum + 1;
}
