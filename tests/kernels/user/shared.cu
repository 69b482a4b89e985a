// Shared memory in every spelling.

extern __shared__ float outside[];  // declared outside of functions

extern "C" __global__ void reverse_outside(const float* x, float* y, int n) {
    outside[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = outside[n - 1 - threadIdx.x];
}

extern "C" __global__ void reverse_inside(const float* x, float* y, int n) {
    extern __shared__ __align__(16) unsigned char raw[];
    float* tile = reinterpret_cast<float*>(raw);
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

extern "C" __global__ void transpose(const float* x,  // (n, n)
                                     float* y,        // (n, n)
                                     int n) {
    __shared__ float tile[16][16 + 1], spare[2];
    __shared__ int count;
    int column = blockIdx.x * 16 + threadIdx.x, row = blockIdx.y * 16 + threadIdx.y;
    if (threadIdx.x == 0 && threadIdx.y == 0) count = 1, spare[1] = 0;
    if (row < n && column < n) tile[threadIdx.y][threadIdx.x] = x[row * n + column];
    __syncthreads();
    int out_column = blockIdx.y * 16 + threadIdx.x, out_row = blockIdx.x * 16 + threadIdx.y;
    if (out_row < n && out_column < n) y[out_row * n + out_column] = tile[threadIdx.x][threadIdx.y] * count + spare[1];
}

// 256 threads, 255 elements.
extern "C" __global__ void shared_overrun(const float* x, float* y) {
    __shared__ float tile[255];
    tile[threadIdx.x] = x[threadIdx.x];  // shared overrun
    __syncthreads();
    y[threadIdx.x] = tile[0];
}
