// Loads under way at once: how a thread goes through elements that it reads once, where memory bounds a kernel.
//
// A memory is busy while as many bytes are under way as it delivers in the time of one access (share.cuh: 29 KB on each
// multiprocessor of an H200). 2048 threads with one number of 4 bytes each have 8 KB under way, and no compiler begins the
// next load before a store that might change it. Here a thread begins LOADS loads before it uses the first:
//
//   for_each_in_flight<LOADS>(first, end, step, load, use)
//
// is `for (i = first; i < end; i += step) use(i, load(i));`, its uses in that order, so that a sum keeps its bits. load(i)
// reads what element i needs, by load_here. Beyond the end it is asked for the first element of its group once more, which
// nobody else changes: a kernel may work in place. `prepare`, if it is given, is called once, while the first loads are under way:
// what `use` needs is then loaded at the same time, not before.
//
// tests/test_in_flight.py counts the loads before the first use in the machine code.
#pragma once
#include "types.cuh"

// A number, or a Piece, from global memory where it stands: left alone, the compiler moves a load next to its use, or into a
// branch.
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

// 16 bytes of float or double, in which a thread moves numbers that are whole groups of them and begin at a multiple of 16.
template <class T>
union __align__(16) Sixteen {
    unsigned words[4];
    T of[16 / sizeof(T)];
};

template <class T>
__device__ inline bool in_sixteens(const T* array, int64 count) {
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
