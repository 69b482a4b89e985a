// bfloat16, the upper half of a float: 8 bits of exponent, 7 of fraction. It is stored; sums are carried in float.
//
// Own type: NVIDIA's cuda_bf16.h is no part of NVRTC, and the host needs one too. Conversion is to nearest with ties to
// even, and every NaN becomes 0x7FFF: one instruction from sm_80 on, elsewhere arithmetic on bits that gives the same.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define BFLOAT16_INSTRUCTIONS
#endif

struct bfloat16 {
    unsigned short bits;

    bfloat16() = default;
    __device__ bfloat16(float value) {
#ifdef BFLOAT16_INSTRUCTIONS
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
        const unsigned u = __float_as_uint(value);
        const unsigned rounded = u + 0x7FFF + (u >> 16 & 1);  // a carry goes on into the exponent, up to infinity
        bits = (unsigned short)((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : rounded >> 16);
#endif
    }
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

// Two numbers, rounded, as they lie in memory: the first in the low half.
__device__ inline unsigned bfloat16_pair(float first, float second) {
#ifdef BFLOAT16_INSTRUCTIONS
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return bfloat16(first).bits | (unsigned)bfloat16(second).bits << 16;
#endif
}
