// A piece: a 16-byte vector of neighbouring channels, 4 float32 or 8 bfloat16, which a thread loads or stores by one instruction;
// and its numbers as float.
#pragma once
#include "in_flight.cuh"

#define PIECE_BYTES 16
#define PIECE (PIECE_BYTES / (int)sizeof(storage_t))  // numbers in it

struct __align__(PIECE_BYTES) Piece {
    unsigned words[4];
};

// A piece moved between registers and global memory by one instruction. Copied as a struct, or stored as a uint4, it
// would be up to the compiler, which moves four words one by one where they come out of branches or go into arithmetic.
__device__ inline Piece load_piece(const storage_t* from) {
#ifdef SEGNET_HOST
    return *(const Piece*)from;
#else
    const uint4 words = *(const uint4*)from;
    return {{words.x, words.y, words.z, words.w}};
#endif
}
__device__ inline Piece load_piece_here(const storage_t* from) { return load_here((const Piece*)from); }
__device__ inline void store_piece(storage_t* to, const Piece& piece) {
#ifdef SEGNET_HOST
    *(Piece*)to = piece;
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(piece.words[0]), "r"(piece.words[1]),
                 "r"(piece.words[2]), "r"(piece.words[3])
                 : "memory");
#endif
}

// Has the 128 bytes around an address fetched into the L2 cache; nothing waits for them.
__device__ inline void fetch(const storage_t* from) {
#ifndef SEGNET_HOST
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

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

// The numbers of a channel vector for the channels of a piece, all of which there are: 16 bytes per load, so that a vector begins
// at a multiple of 16 bytes, as allocations and the arena's arrays do.
__device__ inline Values channels_of(const float* vector, int64 channel) {
    Values values;
#pragma unroll
    for (int i = 0; i < PIECE; i += 4) {
        const Piece four = load_piece_here((const storage_t*)(vector + channel + i));  // of float, whatever is stored
#pragma unroll
        for (int k = 0; k < 4; ++k) values.of[i + k] = __uint_as_float(four.words[k]);
    }
    return values;
}

// The numbers as they are stored: rounded.
__device__ inline Piece piece_of(const Values& values) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(storage_t) == 2)
            piece.words[i] = bfloat16_pair(values.of[2 * i], values.of[2 * i + 1]);
        else
            piece.words[i] = __float_as_uint(values.of[i]);
    }
    return piece;
}

// Numbers that came from pieces, put together again bit by bit.
__device__ inline Piece piece_of_exact(const Values& values) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(storage_t) == 2)
            piece.words[i] =
                __float_as_uint(values.of[2 * i]) >> 16 | (__float_as_uint(values.of[2 * i + 1]) & 0xFFFF0000u);
        else
            piece.words[i] = __float_as_uint(values.of[i]);
    }
    return piece;
}

// max(x, 0) of rounded numbers; a NaN stays one.
__device__ inline Piece relu(Piece piece) {
#pragma unroll
    for (unsigned& word : piece.words) {
        if constexpr (sizeof(storage_t) == 2) {
            const unsigned signs = word & 0x80008000u;   // of no NaN: rounding makes them positive (bfloat16.cuh)
            word &= ~(signs | (signs - (signs >> 15)));  // both halves at once: all bits of a half with its sign set
        } else if (__uint_as_float(word) <= 0) {
            word = 0;
        }
    }
    return piece;
}
