// Every wrapper of Hopper's instructions once, so that each is compiled for sm_90a and for the host.
// Element types: bf16; sm_90a only.
#include "common/tma.cuh"
#include "common/wgmma.cuh"

template <int N, class A, class B>
__device__ void product(float* out, A a, B b) {
    Accumulators<N> sums;
    wgmma_fence();
    wgmma(sums, a, b, false);
    wgmma(sums, a, b, true);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) out[wgmma_row(i) * N + wgmma_column(i)] = sums[i];
}

extern "C" __global__ void __launch_bounds__(256, 1) hopper_wrappers(const __grid_constant__ TensorMap plane,
                                                                     const __grid_constant__ TensorMap cube,
                                                                     const __grid_constant__ TensorMap images,
                                                                     const __grid_constant__ TensorMap columns,
                                                                     float* out) {
    SHARED_DYNAMIC(char, raw);
    SHARED_ARRAY(Mbarrier, full, [1]);
    if (threadIdx.x == 0) {
        tma_prefetch(plane);
        mbarrier_init(full[0], 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (warpgroup_index() == 1) {
        setmaxnreg_decrease<40>();
        if (warpgroup_thread() == 0) {
            mbarrier_arrive_expect_tx(full[0], 4 * 8192);
            tma_load(raw, plane, {0, 0}, full[0]);
            tma_load(raw + 8192, cube, {0, 0, 0}, full[0]);
            tma_load(raw + 16384, images, {0, -1, -1, 0}, full[0]);
            tma_load_im2col(raw + 24576, columns, {0, -1, -1, 0}, {1, 1}, full[0]);
        }
        named_barrier_arrive(1, 256);
    } else {
        setmaxnreg_increase<232>();
        RingPosition<1> position;
        mbarrier_wait(full[position.stage], position.parity);
        position.advance();
        product<8>(out, k_major(raw, 1024), k_major(raw, 1024));
        product<16>(out, k_major(raw, 1024), k_major(raw, 1024));
        product<24>(out, k_major(raw, 1024), k_major(raw, 1024));
        product<32>(out, k_major(raw, 1024), k_major(raw, 1024));
        product<64>(out, mn_major(raw, 128, 1024), k_major(raw, 1024));
        product<96>(out, k_major(raw, 1024), k_major(raw, 1024));
        product<128>(out, k_major(raw, 1024), mn_major(raw, 128, 1024));
        product<192>(out, mn_major(raw, 128, 1024), mn_major(raw, 128, 1024));
        product<256>(out, k_major(raw, 1024), k_major(raw, 1024));
        mbarrier_arrive(full[0]);
        named_barrier_sync(1, 256);
        fence_proxy_async();
        if (warpgroup_thread() == 0) {
            tma_store(plane, {0, 0}, raw);
            tma_store(cube, {0, 0, 0}, raw + 8192);
            tma_store(images, {0, 0, 0, 0}, raw + 16384);
            tma_store_commit();
            tma_store_wait_read<0>();
            tma_store_wait<0>();
        }
    }
}
