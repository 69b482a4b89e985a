// bfloat16, the upper half of a float: 8 bits of exponent, 7 of fraction. It is stored; sums are carried in float.
//
// Own type: NVIDIA's cuda_bf16.h is no part of NVRTC, and the host needs one too. Conversion is arithmetic on bits, to
// nearest with ties to even, the same on every GPU and on the host.
#pragma once

struct bfloat16 {
    unsigned short bits;

    bfloat16() = default;
    __device__ bfloat16(float value) {
        const unsigned u = __float_as_uint(value);
        const unsigned rounded = u + 0x7FFF + (u >> 16 & 1);  // a carry goes on into the exponent, up to infinity
        bits = (unsigned short)((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : rounded >> 16);
    }
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
