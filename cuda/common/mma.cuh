// The instructions of tensor cores: what a warp multiplies, and how its 32 threads hold the matrices (sm_80 and newer;
// layouts from NVIDIA's PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions").
//
// A fragment is the part of a matrix that a thread holds in registers of 32 bits. With g = lane / 4, t = lane % 4:
//
//                     tf32: one number a register      bf16: two numbers a register, the lower half first
//   a  16 x k   a[0]  row g      column t              row g      columns 2t, 2t + 1
//               a[1]  row g + 8  column t              row g + 8  columns 2t, 2t + 1
//               a[2]  row g      column t + 4          row g      columns 2t + 8, 2t + 9
//               a[3]  row g + 8  column t + 4          row g + 8  columns 2t + 8, 2t + 9
//   b  k x 8    b[0]  row t      column g              rows 2t, 2t + 1      column g
//               b[1]  row t + 4  column g              rows 2t + 8, 2t + 9  column g
//   d  16 x 8   d[0], d[1]  row g, columns 2t, 2t + 1;   d[2], d[3]  row g + 8, columns 2t, 2t + 1    (float32)
//
//   mma_m16n8k8_tf32(d, a, b), mma_m16n8k16_bf16(d, a, b)   d[n] += a b[n] for N fragments b and d side by side: N
//       instructions, which on the host are one meeting of the warp
//   ldmatrix_x4(r0, r1, r2, r3, row)   loads four 8 x 8 matrices of 16-bit numbers from shared memory. Lane l points at
//       row l % 8 of matrix l / 8, 16 bytes; it receives, of matrix i in ri, the numbers (row g, columns 2t, 2t + 1).
//       Of 32-bit numbers a row holds four, and the lane receives (row g, column t): a and b of tf32.
//   ldmatrix_x4_trans   the same of the transposed matrices: lane l receives (rows 2t, 2t + 1, column g), 16 bits only
//
// Products are exact (11 x 11 or 8 x 8 bits). They are added to d with bits cut off, not rounded, in a way that is not
// documented and differs between generations of GPUs; the host does what was measured of one (host_tensor_core.h).
#pragma once
#include "warp.cuh"

// A float as a tensor core's tf32 (8 bits of exponent, 10 of fraction): to nearest, halves away from zero. Without it
// the hardware ignores the 13 low bits, which loses twice as much and always towards zero.
#ifdef SEGNET_HOST
inline unsigned to_tf32(float value) {
    if (std::isnan(value)) return 0x7FFFFFFF;
    return (__float_as_uint(value) + 0x1000) & 0xFFFFE000;  // a carry goes on into the exponent, up to infinity
}
#else
__device__ inline unsigned to_tf32(float value) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}
#endif

#ifdef SEGNET_HOST
#include "host_tensor_core.h"

namespace host {

struct Product {
    float (*d)[4];
    const unsigned* a;
    const unsigned (*b)[2];
};

// The i-th number of a register; of tf32 the hardware ignores the low bits.
template <int PACK>
float operand(unsigned bits, int i) {
    return __uint_as_float(PACK == 1 ? bits & 0xFFFFE000 : i == 0 ? bits << 16 : bits & 0xFFFF0000);
}

// Gathers the fragments of 32 lanes, multiplies, scatters. PACK numbers lie in a register; N fragments b meet one a.
template <int PACK, int N>
void multiply(Product* const* lanes) {
    constexpr int DEPTH = 8 * PACK;
    float a[16][DEPTH];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4 * PACK; ++i) {
            const int row = lane / 4 + i / PACK % 2 * 8, column = PACK * (lane % 4 + i / PACK / 2 * 4) + i % PACK;
            a[row][column] = operand<PACK>(lanes[lane]->a[i / PACK], i % PACK);
        }
    for (int n = 0; n < N; ++n) {
        float b[DEPTH][8], d[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2 * PACK; ++i)
                b[PACK * (t + i / PACK * 4) + i % PACK][g] = operand<PACK>(lanes[lane]->b[n][i / PACK], i % PACK);
            for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = lanes[lane]->d[n][i];
        }
        for (auto& row : d) {
            Row& sums = *reinterpret_cast<Row*>(row);
            sums = tensor_core_sum<DEPTH>(sums, a[&row - d], 1, b[0], 8);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) lanes[lane]->d[n][i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    }
}

struct MatrixRows {
    const char* row;
    unsigned* registers[4];
};

// Matrix i of four has the 8 rows that lanes 8 i ... 8 i + 7 point at, each of 8 numbers of 16 bits.
template <bool TRANSPOSED>
void load_matrices(MatrixRows* const* lanes) {
    for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix) {
            unsigned short pair[2];
            for (int i = 0; i < 2; ++i) {
                const int along = 2 * (lane % 4) + i, across = lane / 4;
                const int row = TRANSPOSED ? along : across, column = TRANSPOSED ? across : along;
                std::memcpy(&pair[i], lanes[8 * matrix + row]->row + 2 * column, 2);
            }
            *lanes[lane]->registers[matrix] = unsigned(pair[0]) | unsigned(pair[1]) << 16;
        }
}

template <bool TRANSPOSED>
void ldmatrix(const char* instruction, Place here, unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fault(instruction, here, "has a row at an address that is no multiple of 16");
    MatrixRows post{static_cast<const char*>(row), {&r0, &r1, &r2, &r3}};
    meet_full_warp(instruction, here, &post, load_matrices<TRANSPOSED>);
}

}  // namespace host

template <int N>
inline void mma_m16n8k8_tf32(float (&d)[N][4], const unsigned (&a)[4], const unsigned (&b)[N][2], HERE) {
    host::Product post{d, a, b};
    host::meet_full_warp("mma_m16n8k8_tf32", here, &post, host::multiply<1, N>);
}
template <int N>
inline void mma_m16n8k16_bf16(float (&d)[N][4], const unsigned (&a)[4], const unsigned (&b)[N][2], HERE) {
    host::Product post{d, a, b};
    host::meet_full_warp("mma_m16n8k16_bf16", here, &post, host::multiply<2, N>);
}
inline void ldmatrix_x4(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, const void* row, HERE) {
    host::ldmatrix<false>("ldmatrix_x4", here, r0, r1, r2, r3, row);
}
inline void ldmatrix_x4_trans(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, const void* row, HERE) {
    host::ldmatrix<true>("ldmatrix_x4_trans", here, r0, r1, r2, r3, row);
}

#else

template <int N>
__device__ inline void mma_m16n8k8_tf32(float (&d)[N][4], const unsigned (&a)[4], const unsigned (&b)[N][2]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
}

template <int N>
__device__ inline void mma_m16n8k16_bf16(float (&d)[N][4], const unsigned (&a)[4], const unsigned (&b)[N][2]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
}

__device__ inline void ldmatrix_x4(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ inline void ldmatrix_x4_trans(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(shared_address(row))
                 : "memory");
}

#endif
