// Element types, chosen when a source is compiled, and what every kernel needs to index with.
//
//   storage_t     what arrays hold               -DSTORAGE=float | double | bfloat16
//   accumulate_t  what sums are carried in       -DACCUMULATE=float | double
//
// Tensor-core kernels are also told how they multiply: -DMULTIPLY=TF32 | TF32X3 | BF16 (warp_tile.cuh). A source
// that is not compiled for float32 and float64 says for what it is: "// Element types: tf32, bf16; sm_80 and newer."
//
// Sizes of single dimensions travel as int; element counts and offsets are 64 bits wide, so arrays of more than
// 2^31 elements are legal. The launch gate refuses a dimension that does not fit an int.
#pragma once

#ifdef SEGNET_HOST
#include "host_runtime.h"
#endif
#include "bfloat16.cuh"

enum Multiply { TF32, TF32X3, BF16 };
typedef STORAGE storage_t;
typedef ACCUMULATE accumulate_t;
typedef unsigned char uint8;
typedef long long int64;
typedef unsigned long long uint64;

// A pointer that may be null; the launch gate accepts None for it.
#define OPTIONAL

// Arrays in shared memory are declared through these macros, so that the host device can put them between red zones
// and fill them with NaN for every block:
//   SHARED_ARRAY(float, tile, [16][64]);   a fixed size
//   SHARED_DYNAMIC(float, scratch);        the size is given at the launch
#ifndef SEGNET_HOST
#define SHARED_ARRAY(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define SHARED_DYNAMIC(type, name)                                  \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

// Two of a kind, side by side: of numbers, what a thread moves at once.
template <class T>
struct __align__(2 * sizeof(T)) Two {
    T first, second;
};

// Grid-stride loop: any grid covers any count.
#define FOR_EACH_INDEX(index, count)                                                  \
    for (int64 index = (int64)blockIdx.x * blockDim.x + threadIdx.x; index < (count); \
         index += (int64)gridDim.x * blockDim.x)
