// Integer atomics, as plain CUDA C++ writes them: literals of another type than the array.

extern "C" __global__ void histogram(const unsigned char* x, unsigned int* counts, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&counts[x[i]], 1);
}

extern "C" __global__ void all_atomics(int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    atomicAdd(&y[0], 1);
    atomicSub(&y[1], 1);
    atomicMin(&y[2], -i);
    atomicMax(&y[3], i);
    atomicOr(&y[4], i);
    atomicXor(&y[5], i);
    atomicAnd(&y[6], ~i);
    if (i == 0) atomicExch(&y[7], 7);
    int seen = y[8], before;
    do {
        before = seen;
        seen = atomicCAS(&y[8], before, before + 2);
    } while (seen != before);
}
