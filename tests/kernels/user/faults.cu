// Kernels that do not finish, or should not.

extern "C" __global__ void divergent(const float* x, float* y, int n) {
    int i = threadIdx.x;
    if (i < n / 2) __syncthreads();  // divergent
    y[i] = x[i];
}

extern "C" __global__ void wild(float* y, int n) {
    int i = threadIdx.x;
    if (i < n) y[(long long)i << 32] = 1;  // wild
}

extern "C" __global__ void changes_input(const float* x, float* y) {
    int i = threadIdx.x;
    y[i] = x[i];
    const_cast<float*>(x)[i] = 0;
}

extern "C" __global__ void never_ends(volatile int* y) {
    while (y[0] != 12345) {
    }
}

extern "C" __global__ void undefined(int* y, int shift) { y[threadIdx.x] = 1 << shift; }  // undefined
