// The tensor memory accelerator (Hopper: TMA): one thread has a whole box of a tensor copied from global to shared
// memory, by the coordinates of its corner.
//
// A TensorMap describes the tensor in global memory (address, sizes, strides), the box and how the box lies in shared
// memory. It is made before the launch (runtime's tensor maps; `TensorMap` in Python) and is a parameter of the kernel:
//
//     kernel(const __grid_constant__ TensorMap x, ...)
//
//   tma_prefetch(map)                           fetches the description itself
//   tma_load(to, map, {c, x, y, n}, full)       a box whose corner is there, innermost coordinate first, into shared memory;
//                                               what lies outside the tensor is filled with zeros
//   tma_load_im2col(to, map, {c, x, y, n}, {dx, dy}, full)   a run of pixels of an im2col map: see below
//   fence_proxy_async()                         after ordinary stores to shared memory, before wgmma reads them
//
// A load counts its bytes, zeros included, as arrived at `full`, of which somebody must have announced them
// (mbarrier_arrive_expect_tx). `to` is a multiple of 128 bytes; the 16-byte
// pieces of each 128 bytes are exchanged (the swizzle): piece p of the 128 bytes at address a lies at p ^ (a / 128 % 8). Places at
// multiples of 1024 make that the row of the box.
//
// im2col: the map's corners bound the pixels at which a filter's first tap stands: of a 3 x 3 filter with padding 1 -1 to
// width - 2, and so for y. From pixel (x, y, n) on, the load walks these positions in their order, x fastest, on into the
// next row and the next image, for as many pixels as the map says, and brings the channels c... of pixel + (dx, dy) for
// each: the tap's column of the im2col matrix, zeros outside the images.
#pragma once
#include "mbarrier.cuh"

struct __align__(64) TensorMap {
    uint64 opaque[16];
};

#ifdef SEGNET_HOST

inline void tma_prefetch(const TensorMap& map, HERE) { host::fields_of("tma_prefetch", &map, here); }
template <int RANK>
inline void tma_load(void* to, const TensorMap& map, const int (&corner)[RANK], Mbarrier& full, HERE) {
    host::begin_load(host::transfer("tma_load", &map, corner, RANK, to, here), &full);
}
inline void tma_load_im2col(void* to, const TensorMap& map, const int (&pixel)[4], const int (&tap)[2], Mbarrier& full, HERE) {
    host::begin_load_im2col(&map, pixel, tap, to, &full, here);
}
inline void fence_proxy_async(HERE) { host::Hopper::get().update_view(here); }

#else

__device__ inline void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#define TMA_LOAD(rank, names, ...)                                                                                                \
    asm volatile("cp.async.bulk.tensor." rank "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" names "}], " \
                 "[%2];" ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(&full)), __VA_ARGS__                             \
                 : "memory")
template <int RANK>
__device__ inline void tma_load(void* to, const TensorMap& map, const int (&corner)[RANK], Mbarrier& full) {
    static_assert(RANK >= 2 && RANK <= 4, "maps of two to four dimensions");
    const int* const c = corner;
    if constexpr (RANK == 2)
        TMA_LOAD("2", "%3, %4", "r"(c[0]), "r"(c[1]));
    else if constexpr (RANK == 3)
        TMA_LOAD("3", "%3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]));
    else
        TMA_LOAD("4", "%3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

__device__ inline void tma_load_im2col(void* to, const TensorMap& map, const int (&pixel)[4], const int (&tap)[2],
                                       Mbarrier& full) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2], "
        "{%7, %8};" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(&full)), "r"(pixel[0]), "r"(pixel[1]), "r"(pixel[2]), "r"(pixel[3]),
        "h"((unsigned short)tap[0]), "h"((unsigned short)tap[1])
        : "memory");
}

__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif
