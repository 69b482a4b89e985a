// Kernels for the tests of Hopper's instructions together: a product as convolutions are made, and a load that comes too early.
// Element types: bf16; sm_90a only.
#include "common/tma.cuh"
#include "common/wgmma.cuh"

// Dynamic shared memory from its first multiple of 1024 on.
__device__ inline char* aligned_memory() {
    SHARED_DYNAMIC(char, raw);
    return raw + (0u - shared_address(raw)) % 1024;
}

// c (128, 64) = a (128, depth) b (64, depth) transposed: a ring of stages, one producer, two consumers.
#define STAGES 3
#define A_BYTES 16384
#define B_BYTES 8192

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) ring(
    const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
    storage_t* c,  // (128, 64)
    int depth) {
    SHARED_ARRAY(Mbarrier, full, [STAGES]);
    SHARED_ARRAY(Mbarrier, empty, [STAGES]);
    char* const memory = aligned_memory();
    const int consumer = warpgroup_index();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full[i], 1);
            mbarrier_init(empty[i], 2);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    const bool leader = warpgroup_thread() == 0;
    RingPosition<STAGES> ring;
    if (consumer == 2) {
        setmaxnreg_decrease<40>();
        if (!leader) return;
        tma_prefetch(a);
        for (int k = 0; k < depth; k += 64, ring.advance()) {
            char* const stage = memory + ring.stage * (A_BYTES + B_BYTES);
            mbarrier_wait(empty[ring.stage], ring.parity ^ 1);
            mbarrier_arrive_expect_tx(full[ring.stage], A_BYTES + B_BYTES);
            tma_load(stage, a, {k, 0}, full[ring.stage]);
            tma_load(stage + A_BYTES, b, {k, 0}, full[ring.stage]);
        }
        return;
    }
    setmaxnreg_increase<232>();
    Accumulators<64> sums;
    int before = 0;
    for (int k = 0; k < depth; k += 64, before = ring.stage, ring.advance()) {
        const char* const stage = memory + ring.stage * (A_BYTES + B_BYTES);
        mbarrier_wait(full[ring.stage], ring.parity);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            wgmma(
                sums, k_major(stage + consumer * 8192 + step * 32, 1024), k_major(stage + A_BYTES + step * 32, 1024),
                k + step > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (leader && k > 0) mbarrier_arrive(empty[before]);
    }
    wgmma_wait<0>();
    if (leader) mbarrier_arrive(empty[before]);
#pragma unroll
    for (int i = 0; i < 32; ++i) c[(consumer * 64 + wgmma_row(i)) * 64 + wgmma_column(i)] = (storage_t)sums[i];
}

// What an ordinary load finds where a copy is in flight: NaN, and under AddressSanitizer a report with this line.
extern "C" __global__ void __launch_bounds__(32, 1) hopper_early_load(
    const __grid_constant__ TensorMap tile,
    float* out) {  // (1)
    SHARED_ARRAY(Mbarrier, full, [1]);
    char* const memory = aligned_memory();
    if (threadIdx.x == 0) {
        mbarrier_init(full[0], 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect_tx(full[0], B_BYTES);
        tma_load(memory, tile, {0, 0}, full[0]);
        out[0] = *(const storage_t*)memory;  // early
        mbarrier_wait(full[0], 0);
    }
}
