// The warpgroup's matrix product (Hopper: wgmma): 128 threads add a (64 x 16) times b (16 x N) to sums, bfloat16 in, float32
// sums; both operands are read from shared memory, while the threads go on.
//
//   wgmma_fence();                          the registers of the sums, and what was written to shared memory and fenced
//                                           (fence_proxy_async), are ready: before the first product of a group
//   wgmma(sums, a, b, accumulate);          sums += a b; without accumulate sums = a b, whatever they held.
//                                           Accumulators<N> sums: N / 2 numbers per thread; N is 32, 64, 128, 192
//   wgmma_commit();                         the products begun since the last commit become a group
//   wgmma_wait<P>();                        waits until at most the P youngest groups are in flight
//
// All 128 threads execute each of them. Until the wait that covers a group, its sums may not be touched (but by wgmma of
// the same shape), and its operands in shared memory may not be overwritten: on the host both are faults.
//
// A thread holds, with w = its warp in the warpgroup, g = lane / 4 and t = lane % 4:
//
//     sums[4 j + 2 r + i]   row 16 w + g + 8 r   column 8 j + 2 t + i        wgmma_row(4 j + 2 r), wgmma_column(...)
//
// Operands lie in shared memory in atoms with 128-byte swizzle, as tma_load leaves them: 8 rows of 128 bytes, 64 numbers,
// whose eight pieces of 16 bytes are exchanged: piece p lies at p ^ (address / 128 % 8). The hardware swizzles by the bits of
// the final address, so that a matrix may begin at any row of an atom (measured).
//
//   k_major(start, stride)            depth is contiguous: a row is 64 of depth of one row of a (column of b); the next
//                                     eight rows (columns) lie `stride` bytes on. The next 16 of depth: start + 32 bytes
//   mn_major(start, leading, stride)  depth runs down: a row of the atom is 64 rows of a (columns of b) at one depth; the
//                                     next 64 rows (columns) lie `leading` bytes on, the next eight of depth `stride`
//
//   moved(operand, bytes)             the same that begins so many bytes further on: an addition, where a new one takes eight
//                                     instructions, as many as there are between two products
//
// `start`, `leading` and `stride` are multiples of 16 bytes below 256 KiB. Atoms may overlap.
#pragma once
#include "warpgroup.cuh"

// The descriptor of an operand: bits 0-13 start / 16, 16-29 leading / 16, 32-45 stride / 16, 62-63 the swizzle (1: 128 bytes).
struct KMajor {
    uint64 descriptor;
};
struct MNMajor {
    uint64 descriptor;
};

#ifdef SEGNET_HOST
#include "host_wgmma.h"

inline KMajor k_major(const void* start, int stride, HERE) {
    return {host::matrix_descriptor("k_major", start, 16, stride, here)};
}
inline MNMajor mn_major(const void* start, int leading, int stride, HERE) {
    return {host::matrix_descriptor("mn_major", start, leading, stride, here)};
}

#else

__device__ inline uint64 matrix_descriptor(const void* start, int leading, int stride) {
    return (uint64)((shared_address(start) & 0x3FFFF) >> 4) | (uint64)(leading >> 4) << 16 | (uint64)(stride >> 4) << 32 |
           (uint64)1 << 62;
}
__device__ inline KMajor k_major(const void* start, int stride) {
    return {matrix_descriptor(start, 16, stride)};  // with a swizzle the leading distance of K-major is not looked at
}
__device__ inline MNMajor mn_major(const void* start, int leading, int stride) {
    return {matrix_descriptor(start, leading, stride)};
}

#endif

template <class Operand>
__device__ inline Operand moved(Operand operand, int bytes) {
    return {operand.descriptor + (bytes >> 4)};
}

// Row and column of sums[i] in the product.
__device__ inline int wgmma_row(int i) { return 16 * (warpgroup_thread() / WARP) + warp_lane() / 4 + i / 2 % 2 * 8; }
__device__ inline int wgmma_column(int i) { return i / 4 * 8 + 2 * (warp_lane() % 4) + i % 2; }

template <class Operand>
constexpr bool is_mn_major = false;
template <>
constexpr bool is_mn_major<MNMajor> = true;

#ifdef SEGNET_HOST

// Accumulators that know whether products are in flight.
template <int N>
struct Accumulators {
    float values[N / 2];
    host::Fragment fragment;

    Accumulators() {
        std::memset(values, host::kPoisonByte, sizeof values);
        const unsigned long long& epoch = host::Hopper::get().self().epoch;
        fragment = {values, N / 2, nullptr, {}, &epoch, epoch};
    }
    Accumulators(const Accumulators&) = delete;
    ~Accumulators() {
        if (fragment.pending) host::fault("the end of accumulators", fragment.begun, "comes before a wgmma_wait covers this product");
    }
    float& operator[](host::Index i) {
        if (fragment.pending) fragment.report_access(i.place);
        fragment.touched = *fragment.epoch;
        return values[i.value];
    }
    float operator[](host::Index i) const { return const_cast<Accumulators&>(*this)[i]; }
};

using host::wgmma_fence, host::wgmma_commit;
template <int PENDING>
inline void wgmma_wait(HERE) { host::wait_for_products(PENDING, here); }
template <int N, class A, class B>
inline void wgmma(Accumulators<N>& sums, A a, B b, bool accumulate, HERE) {
    host::begin_product(sums.fragment, {a.descriptor, is_mn_major<A>, 64}, {b.descriptor, is_mn_major<B>, N}, accumulate, here);
}

#else

template <int N>
struct Accumulators {
    float values[N / 2];
    __device__ float& operator[](int i) { return values[i]; }
    __device__ float operator[](int i) const { return values[i]; }
};

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 \
    NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                   \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
             ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_96                                                                                   \
    NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
             ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_96(i) SUMS_64(i), SUMS_32(i + 64)

// Of one N. Operands are numbered through: the sums, then a, b, accumulate and whether a and b are MN-major.
#define WGMMA(n, COUNT, A, B, ACCUMULATE, A_MN, B_MN)                                                          \
    if constexpr (N == n)                                                                                      \
    asm volatile(                                                                                              \
        "{\n"                                                                                                  \
        ".reg .pred accumulate;\n"                                                                             \
        "setp.ne.b32 accumulate, " ACCUMULATE ", 0;\n"                                                         \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" NAMES_##COUNT "}, " A ", " B              \
        ", accumulate, 1, 1, " A_MN ", " B_MN ";\n"                                                            \
        "}"                                                                                                    \
        : SUMS_##COUNT(0)                                                                                      \
        : "l"(a.descriptor), "l"(b.descriptor), "r"((int)accumulate), "n"((int)is_mn_major<A_Operand>),        \
          "n"((int)is_mn_major<B_Operand>))

template <int N, class A_Operand, class B_Operand>
__device__ __forceinline__ void wgmma(Accumulators<N>& accumulators, A_Operand a, B_Operand b, bool accumulate) {
    static_assert(N == 32 || N == 64 || N == 128 || N == 192, "no such N");
    float(&sums)[N / 2] = accumulators.values;
    WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20");
    WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36");
    WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68");
    WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100");
}

#undef WGMMA

#endif
