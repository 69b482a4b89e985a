// Kernels that look as if their threads never met.
#include "hidden.cuh"

extern "C" __global__ void hidden_barrier(
    int* out  // (1)
) {
    meet();
    out[0] = 1;
}

extern "C" __global__ void hidden_shared(
    int* out  // (1)
) {
    out[0] = through_shared(1);
}
