// A piece: 16 bytes of a map, what a thread moves at once: 4 float32 or 8 bfloat16; and its numbers as float.
#pragma once
#include "types.cuh"

#define PIECE_BYTES 16
#define PIECE (PIECE_BYTES / (int)sizeof(storage_t))  // numbers in it

struct __align__(PIECE_BYTES) Piece {
    unsigned words[4];
};

struct Values {
    float of[PIECE];
};

__device__ inline Values values_of(const Piece& piece) {
    Values values;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        if constexpr (sizeof(storage_t) == 2)
            values.of[i] = __uint_as_float(i % 2 ? piece.words[i / 2] & 0xFFFF0000u : piece.words[i / 2] << 16);
        else
            values.of[i] = __uint_as_float(piece.words[i]);
    }
    return values;
}

// The numbers of a channel vector for the channels of a piece; 0 beyond the last channel.
__device__ inline Values channels_of(const accumulate_t* vector, int channel, int channels) {
    Values values;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) values.of[i] = channel + i < channels ? vector[channel + i] : 0;
    return values;
}

__device__ inline Piece either(const Piece& a, const Piece& b) {
    return {{a.words[0] | b.words[0], a.words[1] | b.words[1], a.words[2] | b.words[2], a.words[3] | b.words[3]}};
}

// The numbers as they are stored.
__device__ inline Piece piece_of(const Values& values) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(storage_t) == 2)
            piece.words[i] = bfloat16(values.of[2 * i]).bits | (unsigned)bfloat16(values.of[2 * i + 1]).bits << 16;
        else
            piece.words[i] = __float_as_uint(values.of[i]);
    }
    return piece;
}

// max(x, 0) of stored numbers, by their signs; a NaN stays one.
__device__ inline Piece relu(Piece piece) {
    const Values values = values_of(piece);
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (values.of[i] <= 0) {
            if constexpr (sizeof(storage_t) == 2)
                piece.words[i / 2] &= i % 2 ? 0x0000FFFFu : 0xFFFF0000u;
            else
                piece.words[i] = 0;
        }
    return piece;
}
