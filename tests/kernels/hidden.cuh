// Barriers and shared arrays where the parser does not look: it reads the .cu file only.
#pragma once
#include "common/types.cuh"

__device__ inline void meet() { __syncthreads(); }

__device__ inline int through_shared(int value) {
    SHARED_ARRAY(int, cell, [1]);
    cell[0] = value;
    return cell[0];
}
