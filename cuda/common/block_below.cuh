// The block below a convolution, whose output the convolution read, and what it does to the gradient of that output: the
// ReLU mask, and the sums that the backward pass of its batch norm needs.
//
// z = relu((y - mean) inv_std weight + bias) is not kept; its sign comes from y, which is: where the block ends in a pool,
// from y at the position that the pool chose.
#pragma once
#include "packed_codes.cuh"

struct Below {
    const storage_t* y;  // (n, h, w, channels), before batch norm
    const accumulate_t *mean, *inv_std, *weight, *bias;
    const uint8* pool_codes;  // null: it does not end in a pool
    int h, w;
    bool relu;

    // The piece of y that belongs to a pixel of the block's output: of a pool, at the position that it chose.
    __device__ Piece piece(int64 pixel, int channel, int channels) const {
        if (!pool_codes) return load_piece(y + pixel * channels + channel);
        const int columns = (w + 1) / 2, rows = (h + 1) / 2;
        const int64 line = pixel / columns, image = line / rows;
        const int column = (int)(pixel - line * columns) * 2, row = (int)(line - image * rows) * 2;
        const storage_t* const first = y + ((image * h + row) * w + column) * channels + channel;
        const unsigned codes = piece_codes(pool_codes, pixel * channels + channel);
        Piece chosen = at_position(load_piece(first), codes, 0);
        const bool second_column = column + 1 < w, second_row = row + 1 < h;
        if (second_column) chosen = either(chosen, at_position(load_piece(first + channels), codes, 1));
        if (second_row) chosen = either(chosen, at_position(load_piece(first + (int64)w * channels), codes, 2));
        if (second_column && second_row)
            chosen = either(chosen, at_position(load_piece(first + (int64)(w + 1) * channels), codes, 3));
        return chosen;
    }
};

// Sums of dr, the gradient before the ReLU, and of dr xhat, for the channels of a piece.
struct GradientSums {
    Values plain = {}, xhat = {};
};

// The batch norm of the block below, for the channels of a piece.
struct NormBelow {
    Values mean, inv_std, weight, bias;
    __device__ NormBelow(const Below& below, int channel, int channels)
        : mean(channels_of(below.mean, channel, channels)),
          inv_std(channels_of(below.inv_std, channel, channels)),
          weight(channels_of(below.weight, channel, channels)),
          bias(channels_of(below.bias, channel, channels)) {}

    // dr from the gradient of the block's output and y; what is summed up of it is what is stored.
    __device__ Piece gradient(const Piece& of_output, const Piece& of_y, bool relu, GradientSums& sums) const {
        const Values y = values_of(of_y);
        Values dr = values_of(of_output);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const float distance = y.of[i] - mean.of[i];
            const bool passes = distance * (inv_std.of[i] * weight.of[i]) + bias.of[i] > 0;
            if (relu && !passes) dr.of[i] = 0;
            sums.plain.of[i] += dr.of[i];
            sums.xhat.of[i] += dr.of[i] * (distance * inv_std.of[i]);
        }
        return piece_of(dr);
    }
};
