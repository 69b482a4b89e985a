// The bugs that everybody writes once.

// Blocks of 256 over n elements, and nobody asks whether there is an element.
extern "C" __global__ void copy_unbounded(const float* a, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    c[i] = a[i];
}

extern "C" __global__ void bytes_unbounded(const unsigned char* a, unsigned char* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    c[i] = a[i];
}

// Each thread one place further: inside the zones nothing is where it was.
extern "C" __global__ void shift_unbounded(float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float before = c[i + 1];
    __syncthreads();
    c[i] = before;
}

// Mirrored in blocks of 256, without the barrier between.
extern "C" __global__ void mirror_racy(const float* x, float* y) {
    __shared__ float tile[256];
    tile[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x];
    y[blockIdx.x * 256 + threadIdx.x] = tile[255 - threadIdx.x];
}

extern "C" __global__ void mirror_racy_integers(const int* x, int* y) {
    __shared__ int tile[256];
    tile[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x];
    y[blockIdx.x * 256 + threadIdx.x] = tile[255 - threadIdx.x];
}

// Right in ascending order of the threads.
extern "C" __global__ void neighbour_racy(const float* x, float* y) {
    __shared__ float tile[256];
    tile[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = threadIdx.x ? tile[threadIdx.x - 1] : 0;
}

extern "C" __global__ void only_uninitialised(float* y) {
    __shared__ float tile[256];
    y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void uninitialised_flag(int* y) {
    __shared__ int flag;
    if (threadIdx.x == 300) flag = 1;
    __syncthreads();
    y[threadIdx.x] = flag < 0 ? -flag : flag;
}

extern "C" __global__ void no_number(const float* x, float* y) {
    float zero = 0 * x[threadIdx.x];
    y[threadIdx.x] = threadIdx.x == 7 ? zero / zero : x[threadIdx.x];
}

extern "C" __global__ void sum_without_start(const float* x, float* y, int n) {
    float sum;
    for (int i = 0; i < n; ++i) sum += x[i];  // without a start
    y[threadIdx.x] = sum;
}
