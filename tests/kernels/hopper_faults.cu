// Kernels that hang, race or corrupt on a GPU, each in its own way, without a word. The host device names the line marked
// "here"; "case" and its comment are the number and name by which the test calls it.
// Element types: bf16; sm_90a only.
#include "common/tma.cuh"
#include "common/wgmma.cuh"

#define TILE 8192  // bytes: 64 rows of 64 bfloat16

struct Scene {
    char* memory;       // four tiles; the first two hold numbers, stored and fenced
    Mbarrier* barrier;  // four, of which two are initialised, with one arrival
};

// A product of the first two tiles.
__device__ inline void multiply(Accumulators<64>& sums, const Scene& scene) {
    wgmma(sums, k_major(scene.memory, 1024), k_major(scene.memory + TILE, 1024), false);
}

// clang-format off
__device__ inline void fault_of(int fault, const Scene& scene, const TensorMap& tile, const TensorMap& row, float* out) {
    const int thread = threadIdx.x;
    char* const memory = scene.memory;
    Mbarrier* const barrier = scene.barrier;
    const bool first = thread == 0, one_group = warpgroup_index() == 0;
    switch (fault) {
        case 0:  // an endless wait: nobody arrives
            mbarrier_wait(barrier[0], 0);  // here
            break;
        case 1:  // an endless wait: the parity is that of the next phase
            if (first) mbarrier_arrive(barrier[0]);
            mbarrier_wait(barrier[0], 0);
            mbarrier_wait(barrier[0], 1);  // here
            break;
        case 2:  // an endless wait: more bytes are announced than copied
            if (first) {
                mbarrier_arrive_expect_tx(barrier[0], TILE + 16);
                tma_load(memory + 2 * TILE, tile, {0, 0}, barrier[0]);
            }
            mbarrier_wait(barrier[0], 0);  // here
            break;
        case 3:  // more bytes are copied than announced
            if (first) {
                mbarrier_arrive_expect_tx(barrier[0], TILE - 16);
                tma_load(memory + 2 * TILE, tile, {0, 0}, barrier[0]);  // here
            }
            mbarrier_wait(barrier[0], 0);
            break;
        case 4:  // more arrivals than announced
            if (thread < 2) mbarrier_arrive_expect_tx(barrier[0], TILE);  // here
            break;
        case 5:  // a phase is missed: the ring went on without this thread
            if (thread == WARPGROUP) {
                mbarrier_arrive(barrier[1]);
                mbarrier_wait(barrier[0], 0);  // here
            } else if (first) {
                mbarrier_wait(barrier[1], 0);
                mbarrier_arrive(barrier[0]);
                mbarrier_arrive(barrier[0]);
            }
            break;
        case 6:  // an mbarrier that is not initialised
            if (first) mbarrier_arrive(barrier[2]);  // here
            break;
        case 7:  // an mbarrier without the fence after its initialisation
            if (first) mbarrier_init(barrier[2], 1);
            __syncthreads();
            mbarrier_wait(barrier[2], 1);  // here
            break;
        case 8:  // an mbarrier over which something was stored
            if (first) barrier[0].state = 1;
            __syncthreads();
            mbarrier_wait(barrier[0], 1);  // here
            break;
        case 9:  // TMA overwrites a place that a product still reads
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                multiply(sums, scene);
                wgmma_commit();
                named_barrier_sync(1, WARPGROUP);
                if (first) tma_load(memory, tile, {0, 0}, barrier[0]);  // here
                wgmma_wait<0>();
            }
            break;
        case 10:  // threads overwrite a place that a product still reads
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                wgmma(sums, k_major(memory, 1024), k_major(memory + TILE, 1024), false);  // here
                wgmma_commit();
                memory[thread] = 1;
                wgmma_wait<0>();
            }
            break;
        case 11:  // threads overwrite and fence a place that a product still reads
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                multiply(sums, scene);
                wgmma_commit();
                memory[thread] = 1;
                fence_proxy_async();  // here
                wgmma_wait<0>();
            }
            break;
        case 12:  // accumulators read before the wait
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                multiply(sums, scene);
                wgmma_commit();
                out[thread] = sums[0];  // here
                wgmma_wait<0>();
            }
            break;
        case 13:  // accumulators read while the youngest group is in flight
            if (one_group) {
                Accumulators<64> sums;
                for (int i = 0; i < 2; ++i) {
                    wgmma_fence();
                    multiply(sums, scene);
                    wgmma_commit();
                }
                wgmma_wait<1>();
                out[thread] = sums[0];  // here
                wgmma_wait<0>();
            }
            break;
        case 14:  // accumulators changed without wgmma_fence
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                sums[0] = 1;
                wgmma(sums, k_major(memory, 1024), k_major(memory + TILE, 1024), true);  // here
                wgmma_commit();
                wgmma_wait<0>();
            }
            break;
        case 15:  // a product reads what threads stored without fence_proxy_async
            memory[thread] = 1;
            __syncthreads();
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                wgmma(sums, k_major(memory, 1024), k_major(memory + TILE, 1024), false);  // here
                wgmma_commit();
                wgmma_wait<0>();
            }
            break;
        case 16:  // only the first thread fences, before the others have stored
            memory[thread] = 1;
            if (first) fence_proxy_async();
            __syncthreads();
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                wgmma(sums, k_major(memory, 1024), k_major(memory + TILE, 1024), false);  // here
                wgmma_commit();
                wgmma_wait<0>();
            }
            break;
        case 17:  // a product reads a place before its mbarrier says that it is full
            if (first) {
                mbarrier_arrive_expect_tx(barrier[0], TILE);
                tma_load(memory, tile, {0, 0}, barrier[0]);
            }
            __syncthreads();
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                wgmma(sums, k_major(memory, 1024), k_major(memory + TILE, 1024), false);  // here
                wgmma_commit();
                wgmma_wait<0>();
            }
            break;
        case 18:  // threads store to a place to which a copy is in flight
            if (first) {
                mbarrier_arrive_expect_tx(barrier[0], TILE);
                tma_load(memory + 2 * TILE, tile, {0, 0}, barrier[0]);  // here
                memory[2 * TILE] = 1;
                mbarrier_wait(barrier[0], 0);
            }
            break;
        case 19:  // a box at a misaligned place
            if (first) tma_load(memory + 2 * TILE + 64, tile, {0, 0}, barrier[0]);  // here
            break;
        case 20:  // a box that does not fit into its array
            if (first) tma_load(memory + 4 * TILE - 1024, tile, {0, 0}, barrier[0]);  // here
            break;
        case 21:  // coordinates of another rank than the map's
            if (first) tma_load(memory + 2 * TILE, tile, {0, 0, 0}, barrier[0]);  // here
            break;
        case 22:  // im2col begins outside of its pixels
            if (first) tma_load_im2col(memory + 2 * TILE, row, {0, 8, -1, 0}, {0, 0}, barrier[0]);  // here
            break;
        case 23:  // a map of im2col for a box
            if (first) tma_load(memory + 2 * TILE, row, {0, 0, 0, 0}, barrier[0]);  // here
            break;
        case 24:  // a matrix that begins at no multiple of 16 bytes
            k_major(memory + 8, 1024);  // here
            break;
        case 25:  // a stride that is no multiple of 16 bytes
            mn_major(memory, 128, 1032);  // here
            break;
        case 26:  // a matrix that passes the end of its array
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                wgmma(sums, k_major(memory, 1024), k_major(memory + 3 * TILE + 1024, 1024), false);  // here
                wgmma_commit();
                wgmma_wait<0>();
            }
            break;
        case 27:  // a swizzle that these kernels do not use
            if (one_group) {
                Accumulators<64> sums;
                KMajor left = k_major(memory, 1024);
                left.descriptor ^= (uint64)3 << 62;
                wgmma_fence();
                wgmma(sums, left, k_major(memory + TILE, 1024), false);  // here
                wgmma_commit();
                wgmma_wait<0>();
            }
            break;
        case 28:  // an incomplete warpgroup
            if (thread < 96) {
                Accumulators<64> sums;
                wgmma_fence();
                multiply(sums, scene);
                wgmma_commit();
                wgmma_wait<0>();  // here
            }
            break;
        case 29:  // threads of a warpgroup name unlike operands
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                wgmma(sums, k_major(memory, 1024), k_major(memory + thread / 32 * 1024, 1024), false);  // here
                wgmma_commit();
                wgmma_wait<0>();
            }
            break;
        case 30:  // a product that nobody waits for
            if (one_group) {
                Accumulators<64> sums;
                wgmma_fence();
                wgmma(sums, k_major(memory, 1024), k_major(memory + TILE, 1024), false);  // here
                wgmma_commit();
            }
            break;
        case 31:  // a load that nobody waits for
            if (first) {
                mbarrier_arrive_expect_tx(barrier[0], TILE);
                tma_load(memory + 2 * TILE, tile, {0, 0}, barrier[0]);  // here
            }
            break;
        case 32:  // more registers than the block has
            setmaxnreg_increase<232>();  // here
            break;
        case 33:  // an increase to fewer registers
            if (one_group) setmaxnreg_increase<40>();  // here
            break;
        case 34:  // a named barrier for unlike numbers of threads
            if (one_group)
                named_barrier_sync(1, 256);
            else
                named_barrier_sync(1, 128);  // here
            break;
        case 35:  // a named barrier that one thread does not reach
            if (thread > 0) named_barrier_sync(1, 256);  // here
            break;
        case 36:  // the barrier of __syncthreads by name
            named_barrier_sync(0, 256);  // here
            break;
    }
}
// clang-format on

extern "C" __global__ void __launch_bounds__(384, 1) hopper_faults(
    const __grid_constant__ TensorMap tile, const __grid_constant__ TensorMap row,
    float* out,  // (256)
    int fault) {
    SHARED_DYNAMIC(char, raw);
    SHARED_ARRAY(Mbarrier, barrier, [4]);
    const Scene scene = {raw + (0u - shared_address(raw)) % 1024, barrier};
    for (int i = threadIdx.x; i < 2 * TILE; i += 256) scene.memory[i] = 0;
    fence_proxy_async();
    if (threadIdx.x == 0) {
        mbarrier_init(barrier[0], 1);
        mbarrier_init(barrier[1], 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    fault_of(fault, scene, tile, row, out);
}
