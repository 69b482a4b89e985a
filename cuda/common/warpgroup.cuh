// The warpgroup: four warps, 128 threads, that multiply together on Hopper; what its threads share out and how they meet.
//
//   warpgroup_index()               number of this thread's warpgroup, in a one-dimensional block; all threads of a warp ask at once
//   warpgroup_thread()              number of this thread in it, 0 to 127
//   setmaxnreg_decrease<N>()        the warpgroup keeps N registers per thread and gives the rest back to its block
//   setmaxnreg_increase<N>()        it takes registers, up to N a thread; waits until others have given them back
//   named_barrier_sync(id, threads)    a barrier of some of the block's warps: `threads` of them, a multiple of 32, meet
//
// Barrier 0 is __syncthreads()'s; 1 to 15 are free. N is a multiple of 8, 24 to 256. A block is launched with as many
// registers per thread as the compiler gave the kernel (__launch_bounds__ decides); decreases and increases together may
// not exceed that times the threads.
//
// Hopper's instructions (here and in mbarrier.cuh, tma.cuh, wgmma.cuh) exist on sm_90a alone, not on newer GPUs: a source
// that includes them says so in its head: "// Element types: bf16; sm_90a only."
#pragma once
#include "warp.cuh"

#if !defined(SEGNET_HOST) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "these instructions exist on sm_90a alone; the head of the .cu file must say: // Element types: bf16; sm_90a only."
#endif

#define WARPGROUP 128

// Out of a shuffle the compiler knows that it is the same in the whole warp: what is derived from it, addresses and descriptors
// of shared memory, is then worked out once for the warp, where the instructions want it, and not by every thread.
__device__ inline int warpgroup_index() { return __shfl_sync(0xFFFFFFFF, (int)(threadIdx.x / WARPGROUP), 0); }
__device__ inline int warpgroup_thread() { return (int)(threadIdx.x % WARPGROUP); }

#ifdef SEGNET_HOST
#include "host_hopper.h"

inline unsigned shared_address(const void* pointer, HERE) { return host::shared_offset("shared_address", here, pointer, 1); }
template <int REGISTERS>
inline void setmaxnreg_decrease(HERE) { host::set_registers("setmaxnreg_decrease", REGISTERS, false, here); }
template <int REGISTERS>
inline void setmaxnreg_increase(HERE) { host::set_registers("setmaxnreg_increase", REGISTERS, true, here); }
using host::named_barrier_sync;

#else

template <int REGISTERS>
__device__ inline void setmaxnreg_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void setmaxnreg_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
__device__ inline void named_barrier_sync(int id, int threads) {
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif
