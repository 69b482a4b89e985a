// The warp: the 32 threads that execute together. CUDA's own shuffles and votes need no wrapper; the host device has
// them too (host_warp.h).
//
// Operations of a whole warp (mma.cuh) take all 32 threads at one line. On the host a default argument notes the line
// of the call, for faults: FROM_LINE ends the parameter list of such an operation.
#pragma once
#include "types.cuh"

#define WARP 32

#ifdef SEGNET_HOST
#define FROM_LINE , int line = __builtin_LINE()
#else
#define FROM_LINE
#endif

// The lane of this thread and the number of its warp, in a one-dimensional block.
__device__ inline int warp_lane() { return (int)(threadIdx.x % WARP); }
__device__ inline int warp_index() { return (int)(threadIdx.x / WARP); }

#ifndef SEGNET_HOST
// The address that instructions of shared memory take.
__device__ inline unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }
#endif
