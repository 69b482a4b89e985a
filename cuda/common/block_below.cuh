// The block below a convolution, whose output the convolution read, and what it does to the gradient of that output: the
// ReLU mask, and the sums that the backward pass of its batch norm needs.
//
// z = relu((y - mean) inv_std weight + bias) is not kept; its sign comes from y, which is. Of a block that ends in a pool, y
// is what norm_relu_pool_forward kept of it, at the positions that the pool chose.
#pragma once
#include "piece.cuh"

struct Below {
    const storage_t* y;  // (n, h, w, channels) as dr has, before batch norm
    const accumulate_t *mean, *inv_std, *weight, *bias;
    bool relu;
};

// Sums of dr, the gradient before the ReLU, and of dr xhat, for the channels of a piece.
struct GradientSums {
    Values first = {}, second = {};
};

// The batch norm of the block below, for the channels of a piece.
struct NormBelow {
    Values mean, inv_std, weight, bias;
    // Beyond the last channel they are those of the last ones: whoever is there stores nothing.
    __device__ NormBelow(const Below& below, int channel, int channels)
        : NormBelow(below, min(channel, channels - PIECE)) {}
    __device__ NormBelow(const Below& below, int channel)
        : mean(channels_of(below.mean, channel)),
          inv_std(channels_of(below.inv_std, channel)),
          weight(channels_of(below.weight, channel)),
          bias(channels_of(below.bias, channel)) {}

    // dr from the gradient of the block's output and y; what is summed up of it is what is stored.
    __device__ Piece gradient(const Piece& of_output, const Piece& of_y, bool relu, GradientSums& sums) const {
        const Values y = values_of(of_y);
        Values dr = values_of(of_output);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const float distance = y.of[i] - mean.of[i];
            const bool passes = distance * (inv_std.of[i] * weight.of[i]) + bias.of[i] > 0;
            if (relu && !passes) dr.of[i] = 0;
            sums.first.of[i] += dr.of[i];
            sums.second.of[i] += dr.of[i] * (distance * inv_std.of[i]);
        }
        return piece_of(dr);
    }
};
