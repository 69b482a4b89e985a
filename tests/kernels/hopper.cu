// Kernels for the tests of Hopper's instructions: operands, boxes and sums lie open in global memory.
// Element types: bf16; sm_90a only.
#include "common/tma.cuh"
#include "common/wgmma.cuh"

// Dynamic shared memory from its first multiple of 1024 on.
__device__ inline char* aligned_memory() {
    SHARED_DYNAMIC(char, raw);
    return raw + (0u - shared_address(raw)) % 1024;
}

// Shared memory as the test wants it, stored by all threads and made visible to TMA and wgmma.
__device__ inline void fill_shared(char* memory, const uint8* image, int bytes) {
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) memory[i] = (char)image[i];
    fence_proxy_async();
    __syncthreads();
}

// numbers: start, leading and stride of a, then of b.
template <int N, bool A_MN, bool B_MN>
__device__ void open_product(const char* memory, const int* numbers, bool accumulate, float* out) {
    Accumulators<N> sums;
    for (int i = 0; i < N / 2; ++i) sums[i] = out[wgmma_row(i) * N + wgmma_column(i)];
    auto multiply = [&](auto a, auto b) {
        wgmma_fence();
        wgmma(sums, a, b, accumulate);
        wgmma_commit();
        wgmma_wait<0>();
    };
    auto with_b = [&](auto a) {
        if constexpr (B_MN)
            multiply(a, mn_major(memory + numbers[3], numbers[4], numbers[5]));
        else
            multiply(a, k_major(memory + numbers[3], numbers[5]));
    };
    if constexpr (A_MN)
        with_b(mn_major(memory + numbers[0], numbers[1], numbers[2]));
    else
        with_b(k_major(memory + numbers[0], numbers[2]));
    for (int i = 0; i < N / 2; ++i) out[wgmma_row(i) * N + wgmma_column(i)] = sums[i];
}

template <bool A_MN, bool B_MN>
__device__ void open_products(
    const uint8* image, const int* numbers, const int* accumulate, float* out, int cases, int bytes, int n) {
    char* const memory = aligned_memory();
    fill_shared(memory, image, bytes);
    for (int i = 0; i < cases; ++i, numbers += 6, out += 64 * n) {
        if (n == 32) open_product<32, A_MN, B_MN>(memory, numbers, accumulate[i], out);
        if (n == 64) open_product<64, A_MN, B_MN>(memory, numbers, accumulate[i], out);
        if (n == 128) open_product<128, A_MN, B_MN>(memory, numbers, accumulate[i], out);
        if (n == 192) open_product<192, A_MN, B_MN>(memory, numbers, accumulate[i], out);
    }
}

// Operands K- or MN-major: a, then b.
extern "C" __global__ void __launch_bounds__(WARPGROUP, 1) products_kk(
    const uint8* image,     // (bytes)
    const int* numbers,     // (cases, 6)
    const int* accumulate,  // (cases)
    float* out,             // (cases, 64, n)
    int cases, int bytes, int n) {
    open_products<false, false>(image, numbers, accumulate, out, cases, bytes, n);
}
extern "C" __global__ void __launch_bounds__(WARPGROUP, 1) products_km(
    const uint8* image,     // (bytes)
    const int* numbers,     // (cases, 6)
    const int* accumulate,  // (cases)
    float* out,             // (cases, 64, n)
    int cases, int bytes, int n) {
    open_products<false, true>(image, numbers, accumulate, out, cases, bytes, n);
}
extern "C" __global__ void __launch_bounds__(WARPGROUP, 1) products_mk(
    const uint8* image,     // (bytes)
    const int* numbers,     // (cases, 6)
    const int* accumulate,  // (cases)
    float* out,             // (cases, 64, n)
    int cases, int bytes, int n) {
    open_products<true, false>(image, numbers, accumulate, out, cases, bytes, n);
}
extern "C" __global__ void __launch_bounds__(WARPGROUP, 1) products_mm(
    const uint8* image,     // (bytes)
    const int* numbers,     // (cases, 6)
    const int* accumulate,  // (cases)
    float* out,             // (cases, 64, n)
    int cases, int bytes, int n) {
    open_products<true, true>(image, numbers, accumulate, out, cases, bytes, n);
}

// Loads a box at every corner, one after the other, and shows what lies in shared memory then: `bytes` of each, from
// `place` on.
template <class Load>
__device__ void open_loads(uint8* out, int cases, int bytes, int place, Load load) {
    SHARED_ARRAY(Mbarrier, full, [1]);
    char* const to = aligned_memory() + place;
    if (threadIdx.x == 0) {
        mbarrier_init(full[0], 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    for (int i = 0; i < cases; ++i) {
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect_tx(full[0], bytes);
            load(to, i, full[0]);
        }
        mbarrier_wait(full[0], i % 2);
        for (int j = threadIdx.x; j < bytes; j += blockDim.x) out[(int64)i * bytes + j] = (uint8)to[j];
        __syncthreads();
    }
}

extern "C" __global__ void loads_2d(
    const __grid_constant__ TensorMap map,
    const int* corners,  // (cases, 2)
    uint8* out,          // (cases, bytes)
    int cases, int bytes, int place) {
    open_loads(out, cases, bytes, place, [&](char* to, int i, Mbarrier& full) {
        tma_load(to, map, {corners[2 * i], corners[2 * i + 1]}, full);
    });
}
extern "C" __global__ void loads_3d(
    const __grid_constant__ TensorMap map,
    const int* corners,  // (cases, 3)
    uint8* out,          // (cases, bytes)
    int cases, int bytes, int place) {
    open_loads(out, cases, bytes, place, [&](char* to, int i, Mbarrier& full) {
        tma_load(to, map, {corners[3 * i], corners[3 * i + 1], corners[3 * i + 2]}, full);
    });
}
extern "C" __global__ void loads_4d(
    const __grid_constant__ TensorMap map,
    const int* corners,  // (cases, 4)
    uint8* out,          // (cases, bytes)
    int cases, int bytes, int place) {
    open_loads(out, cases, bytes, place, [&](char* to, int i, Mbarrier& full) {
        tma_load(to, map, {corners[4 * i], corners[4 * i + 1], corners[4 * i + 2], corners[4 * i + 3]}, full);
    });
}
extern "C" __global__ void loads_im2col(
    const __grid_constant__ TensorMap map,
    const int* corners,  // (cases, 6)
    uint8* out,          // (cases, bytes)
    int cases, int bytes, int place) {
    open_loads(out, cases, bytes, place, [&](char* to, int i, Mbarrier& full) {
        const int* const c = corners + 6 * i;
        tma_load_im2col(to, map, {c[0], c[1], c[2], c[3]}, {c[4], c[5]}, full);
    });
}
