// Pooling codes as SegNet stores them, two bits a window: (n, ph, pw, c / 4) bytes, of which the code of channel k is
// bits 2 (k % 4) and up of byte k / 4. A code 0..3 is a position of the 2x2 window: 2 row + column (windows.cuh).
//
// The codes of a piece (piece.cuh) are one byte of float32, two of bfloat16.
#pragma once
#include "piece.cuh"

// The codes of the piece that begins at element `offset` of a map, channel 0 in the lowest bits.
__device__ inline unsigned piece_codes(const uint8* codes, int64 offset) {
    if constexpr (sizeof(storage_t) == 2)
        return *(const unsigned short*)(codes + offset / 4);
    else
        return codes[offset / 4];
}

// A mask of word `i` of a piece: all bits of the numbers whose codes have this bit, 0 (the right column) or 1 (the lower row).
__device__ inline unsigned coded_bits(unsigned codes, int i, int bit) {
    if (sizeof(storage_t) == 4) return 0u - (codes >> (2 * i + bit) & 1);
    // Two numbers in a word: the second one's code comes to lie 16 bits above the first one's.
    return ((codes | codes << 14) >> (4 * i + bit) & 0x10001u) * 0xFFFFu;
}

// The piece, with zeros where the code is not `position`.
__device__ inline Piece at_position(Piece piece, unsigned codes, int position) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned right = coded_bits(codes, i, 0), lower = coded_bits(codes, i, 1);
        piece.words[i] &= (position & 1 ? right : ~right) & (position & 2 ? lower : ~lower);
    }
    return piece;
}

// Of the pieces at(0) ... at(3) of a window, in every channel the number at the coded position.
template <class At>
__device__ inline Piece coded_piece(unsigned codes, At at) {
    const Piece of[4] = {at(0), at(1), at(2), at(3)};
    Piece coded;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned right = coded_bits(codes, i, 0), lower = coded_bits(codes, i, 1);
        const unsigned of_upper = of[0].words[i] & ~right | of[1].words[i] & right;
        const unsigned of_lower = of[2].words[i] & ~right | of[3].words[i] & right;
        coded.words[i] = of_upper & ~lower | of_lower & lower;
    }
    return coded;
}

// Writes the codes of the piece that begins at element `offset` of a map.
__device__ inline void store_codes(uint8* codes, int64 offset, unsigned piece) {
    if constexpr (sizeof(storage_t) == 2)
        *(unsigned short*)(codes + offset / 4) = (unsigned short)piece;
    else
        codes[offset / 4] = (uint8)piece;
}

// The maximum of a window and its position, of pieces that are offered in the order of their positions; the first is
// given at once. Which maximum wins is that of max_pool.cu: the first one, but a NaN over numbers.
struct PooledPiece {
    Values best;
    unsigned chosen[PIECE];

    __device__ explicit PooledPiece(const Piece& first) : best(values_of(first)) {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) chosen[i] = 0;
    }
    __device__ void offer(const Piece& candidate, unsigned code) {
        const Values values = values_of(candidate);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const bool wins = !(values.of[i] <= best.of[i]) && best.of[i] == best.of[i];
            best.of[i] = wins ? values.of[i] : best.of[i];
            chosen[i] = wins ? code : chosen[i];
        }
    }
    __device__ Piece piece() const { return piece_of_exact(best); }
    __device__ unsigned codes() const {
        unsigned packed = 0;
#pragma unroll
        for (int i = 0; i < PIECE; ++i) packed |= chosen[i] << 2 * i;
        return packed;
    }
};
