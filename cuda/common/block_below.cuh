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

// Sums of dr, the gradient before the ReLU, and of dr (y - mean), which inv_std makes that of dr xhat; for the channels of a piece.
struct GradientSums {
    Values first = {}, second = {};
};

// The batch norm of the block below, for the channels of a piece.
struct NormBelow {
    Values mean, scale, bias;
    NormBelow() = default;
    __device__ NormBelow(const Below& below, int channel)
        : mean(channels_of(below.mean, channel)),
          scale(channels_of(below.inv_std, channel)),
          bias(channels_of(below.bias, channel)) {
        const Values weight = channels_of(below.weight, channel);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) scale.of[i] *= weight.of[i];
    }

    // dr from the gradient of the block's output and y; what is summed up of it is what is stored.
    __device__ Piece gradient(const Piece& of_output, const Piece& of_y, bool relu, GradientSums& sums) const {
        const Values y = values_of(of_y);
        Values dr = values_of(of_output);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const float distance = y.of[i] - mean.of[i];
            // distance * scale + bias > 0 as the forward pass rounds it: a sum of two is rounded to 0 only where they cancel.
            const bool passes = distance * scale.of[i] > -bias.of[i];
            if (relu && !passes) dr.of[i] = 0;
            sums.first.of[i] += dr.of[i];
            sums.second.of[i] = fma(dr.of[i], distance, sums.second.of[i]);
        }
        return piece_of(dr);
    }
};
