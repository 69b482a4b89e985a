// Softmax and cross-entropy of one pixel, by the formulas of cross_entropy.cu: what the losses of the layers and of the
// fused engine, and the logarithm of a softmax by itself, have in common.
#pragma once
#include "types.cuh"

// The logarithm of a softmax. The maximum is kept apart from the logarithm of the sum: added up, large logits would
// round away the small numbers that matter.
struct LogSoftmax {
    accumulate_t highest, log_sum;
    __device__ accumulate_t of(accumulate_t logit) const { return (logit - highest) - log_sum; }
};

__device__ inline LogSoftmax log_softmax_of(const storage_t* logits, int classes) {
    accumulate_t highest = logits[0], sum = 0;
    for (int k = 1; k < classes; ++k) highest = max(highest, (accumulate_t)logits[k]);
    for (int k = 0; k < classes; ++k) sum += exp((accumulate_t)logits[k] - highest);
    return {highest, log(sum)};
}

// The weight of a class; 1 without weights.
template <class T>
__device__ inline double weight_of(const T* class_weights, int k) {
    return class_weights ? (double)class_weights[k] : 1.0;
}

template <class T>
__device__ inline double sum_of_weights(const T* class_weights, int classes) {
    double sum = 0;
    for (int k = 0; k < classes; ++k) sum += weight_of(class_weights, k);
    return sum;
}

// The gradient of a pixel's loss, times `scale`: what the normaliser and the gradient of the loss itself come to.
template <class T>
struct LogitGradient {
    const T* class_weights;
    double scale, smoothing;
    double share, all_weights;  // of every class, where labels are smoothed

    __device__ LogitGradient(const T* class_weights, int classes, double scale, double smoothing)
        : class_weights(class_weights),
          scale(scale),
          smoothing(smoothing),
          share(scale * smoothing / classes),
          all_weights(smoothing > 0 ? sum_of_weights(class_weights, classes) : 0) {}

    // What a pixel's own label weighs.
    __device__ accumulate_t factor(int label) const {
        return scale * (1 - smoothing) * weight_of(class_weights, label);
    }

    __device__ accumulate_t of(int k, int label, accumulate_t factor, accumulate_t softmax) const {
        accumulate_t gradient = factor * (softmax - (k == label ? 1 : 0));
        if (smoothing > 0) gradient += share * (all_weights * softmax - weight_of(class_weights, k));
        return gradient;
    }
};
