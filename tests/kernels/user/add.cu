// Vector addition as anybody writes it, right and wrong: no include, no macro of this project.

extern "C" __global__ void vector_add(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}

// One element is wrong.
extern "C" __global__ void vector_add_wrong(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = i == 777 ? a[i] - b[i] : a[i] + b[i];
}

// The last thread writes one element too many.
extern "C" __global__ void vector_add_overrun(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
    if (i == n - 1) c[i + 1] = 0;  // overrun
}

// Reads one element too many.
extern "C" __global__ void vector_add_overread(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i + 1] + b[i];  // overread
}

// Nobody writes the last three elements.
extern "C" __global__ void vector_add_short(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n - 3) c[i] = a[i] + b[i];
}
