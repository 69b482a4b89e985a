// The warp: the 32 threads that execute together. CUDA's own shuffles and votes need no wrapper; the host device has
// them too (host_warp.h).
//
// Operations of a whole warp (mma.cuh) take all 32 threads at one line. On the host a default argument, HERE, notes where the
// call stands, for faults.
#pragma once
#include "types.cuh"

#define WARP 32

// The lane of this thread and the number of its warp, in a one-dimensional block.
__device__ inline int warp_lane() { return (int)(threadIdx.x % WARP); }
__device__ inline int warp_index() { return (int)(threadIdx.x / WARP); }

#ifndef SEGNET_HOST
// The address that instructions of shared memory take.
__device__ inline unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }
#endif
