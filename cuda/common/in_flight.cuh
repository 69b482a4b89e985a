// Loads in flight: how a thread of a memory-bound kernel goes through elements that it reads once.
//
// A memory runs at its full rate while as many bytes are in flight as it delivers during one access (Little's law; grid_stride.cuh:
// 29 KB on each multiprocessor of an H200). 2048 threads with one 4-byte load each have 8 KB in flight, and no compiler moves the
// next load in front of a store that might change it. Here a thread issues LOADS loads before it uses the first:
//
//   for_each_in_flight<LOADS>(first, end, step, load, use)
//
// is `for (i = first; i < end; i += step) use(i, load(i));`, its uses in that order, so that a sum keeps its bits. load(i)
// reads what element i needs, by load_here. Beyond the end it is asked for the first element of its group once more, which
// nobody else changes: a kernel may work in place. `prepare`, if it is given, is called once, while the first loads are in flight:
// what `use` needs is then loaded at the same time, not before.
//
// tests/test_in_flight.py counts the loads before the first use in the machine code.
#pragma once
#include "types.cuh"

// Loads a number, or a Piece, at this point of the program (asm volatile): left alone, the compiler moves a load next to its
// use, or into a branch.
template <class T>
__device__ inline T load_here(const T* from) {
#ifdef SEGNET_HOST
    return *from;
#else
    T value;
    if constexpr (sizeof(T) == 1) {
        unsigned byte;
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(byte) : "l"(from));
        value = (T)byte;
    } else if constexpr (sizeof(T) == 2)
        asm volatile("ld.global.u16 %0, [%1];" : "=h"((unsigned short&)value) : "l"(from));
    else if constexpr (sizeof(T) == 4)
        asm volatile("ld.global.u32 %0, [%1];" : "=r"((unsigned&)value) : "l"(from));
    else if constexpr (sizeof(T) == 16)
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]), "=r"(value.words[3])
                     : "l"(from));
    else
        asm volatile("ld.global.u64 %0, [%1];" : "=l"((uint64&)value) : "l"(from));
    return value;
#endif
}

// A 16-byte vector, 4 float or 2 double, for vectorised loads and stores.
// in_vectors: is the array aligned for them, and does it consist of whole vectors?
template <class T>
union __align__(16) Vector16 {
    unsigned words[4];
    T of[16 / sizeof(T)];
};

template <class T>
__device__ inline bool in_vectors(const T* array, int64 count) {
    return count % (16 / sizeof(T)) == 0 && (uint64)array % 16 == 0;
}

struct Nothing {
    __device__ void operator()() const {}
};

template <int LOADS, class Load, class Use, class Prepare = Nothing>
__device__ __forceinline__ void for_each_in_flight(
    int64 first, int64 end, int64 step, Load load, Use use, Prepare prepare = {}) {
    for (int64 i = first; i < end; i += LOADS * step) {
        decltype(load(i)) loaded[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) loaded[k] = load(i + k * step < end ? i + k * step : i);
        if (i == first) prepare();
#pragma unroll
        for (int k = 0; k < LOADS; ++k)
            if (i + k * step < end) use(i + k * step, loaded[k]);
    }
}

// The same for the elements 0 to count of a flat range, shared out among all threads of the grid.
template <int LOADS, class Load, class Use>
__device__ __forceinline__ void for_each_of_grid(int64 count, Load load, Use use) {
    const int64 first = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    for_each_in_flight<LOADS>(first, count, (int64)gridDim.x * blockDim.x, load, use);
}
