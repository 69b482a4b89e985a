// float32 as the sum of bfloat16 planes, which Hopper's tensor cores multiply (hopper_convolution.cuh).
//
//   plane k of x = bfloat16(x - plane 0 - ... - plane k - 1)
//
// Each plane has 8 bits, rounded to nearest: what one leaves has 16 bits, what two leave 8, at most 2^-16 of x, and three leave
// nothing (but of numbers below 2^-100). Every difference is exact. Of an infinity or a NaN, and of what rounds to an infinity,
// the other planes are 0: infinity - infinity would make it a NaN.
//
// Planes lie side by side in the channels of a map: (rows, planes * c).
#pragma once
#include "piece.cuh"

// What a plane leaves of a number.
__device__ inline float left_by(float plane, float number) { return isfinite(plane) ? number - plane : 0; }

// The planes of a piece of float32, which begins at `to` in the first of them; c numbers from one to the next.
__device__ inline void store_planes(bfloat16* to, int c, int planes, const Piece& piece) {
    float left[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) left[j] = __uint_as_float(piece.words[j]);
    for (int k = 0; k < planes; ++k) {
        const unsigned pairs[2] = {bfloat16_pair(left[0], left[1]), bfloat16_pair(left[2], left[3])};
        *(uint64*)(to + k * c) = pairs[0] | (uint64)pairs[1] << 32;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            left[j] = left_by(__uint_as_float(j % 2 ? pairs[j / 2] & 0xFFFF0000u : pairs[j / 2] << 16), left[j]);
    }
}

// A map (rows, c) that is written piece by piece: as it is stored, or float32 in planes instead.
struct MapOut {
    storage_t* whole;
    bfloat16* in_planes;  // null: as it is stored
    int c, planes;
    // The piece that begins at element i, at this channel.
    __device__ void store(int64 i, int64 channel, const Piece& piece) const {
        if constexpr (sizeof(storage_t) == sizeof(float))
            if (in_planes) return store_planes(in_planes + (i - channel) * planes + channel, c, planes, piece);
        store_piece(whole + i, piece);
    }
};
