// Softmax cross-entropy of the fused engine: loss and gradient in one pass over the logits. Formulas: cross_entropy.cu.
// Element types: float32, bfloat16.
//
// Logits (pixels, padded): `classes` of them, then padding up to whole pieces of 16 bytes, which is not looked at and
// whose gradient is 0. The gradient needs the normaliser first, which depends on the labels alone (1 byte per pixel):
// they are counted before.
//
// Every logit is read once and every gradient written once, by way of shared memory (common/staged.cuh). A thread's three
// passes over its pixel (maximum, sum of exponentials, gradient, which takes the logits' place) meet shared memory alone.
//
// Two exponentials per class make instructions count as much as bytes. So a power of two is one instruction where the gradient is
// bfloat16, the gradient of the label's class is put right at the end instead of asking at every class, and only the piece that
// has padding looks for it.
//
// Sums are carried in double: blocks make partial results in a fixed order, which one block adds up. The grid depends on
// the shape alone. Threads: a piece, or a pixel, each; a block takes its share of pixels in steps of as many as fit.
#include "common/piece.cuh"
#include "common/reduce.cuh"
#include "common/softmax.cuh"
#include "common/staged.cuh"

#define THREADS 256

// Launch: grid blocks, block THREADS
extern "C" __global__ void softmax_cross_entropy_count(
    const uint8* __restrict__ labels,                  // (pixels)
    const float* __restrict__ OPTIONAL class_weights,  // (classes)
    double* __restrict__ partials,                     // (blocks, 2): weights, valid pixels
    int64 pixels, int classes, int blocks) {
    double own[2] = {0, 0};
    for_each_of_grid<4>(
        pixels, [&](int64 pixel) { return load_here(labels + pixel); },
        [&](int64, int label) {
            if (label >= classes) return;
            own[0] += weight_of(class_weights, label);
            own[1] += 1;
        });
    block_store_sums<THREADS>(own, partials);
}

// 1 / normaliser, or 0 where there is no valid pixel; times the share that these pixels have of the batch of all ranks.
// Launch: grid 1, block THREADS
extern "C" __global__ void softmax_cross_entropy_normalise(
    const double* __restrict__ partials,        // (blocks, 2)
    const double* __restrict__ OPTIONAL share,  // (1)
    double* __restrict__ reciprocal,            // (1)
    int blocks, int by_valid) {
    const double normaliser = block_total<THREADS>(partials + by_valid, blocks, 2);
    if (threadIdx.x == 0) reciprocal[0] = normaliser != 0 ? (share ? share[0] : 1) / normaliser : 0.0;
}

// exp(x): for bfloat16 by the instruction for powers of two, whose error, 2^-22 and that
// of x log2 e, |x| 2^-24, its rounding hides.
__device__ inline float exponential(float x) {
#ifndef SEGNET_HOST
    if constexpr (sizeof(storage_t) == 2) {
        float power;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
        return power;
    }
#endif
    return exp(x);
}

// use(logit) for the classes of a pixel in their order.
template <class Use>
__device__ __forceinline__ void for_each_class(const Piece* pixel, int classes, Use use) {
    for (int first = 0; first < classes; first += PIECE) {
        const Values values = values_of(pixel[first / PIECE]);
        if (first + PIECE <= classes)
#pragma unroll
            for (int i = 0; i < PIECE; ++i) use(values.of[i]);
        else
#pragma unroll
            for (int i = 0; i < PIECE - 1; ++i)
                if (first + i < classes) use(values.of[i]);
    }
}

// The gradient of a pixel in the place of its logits, and 0 in that of the padding. The sum of the logarithms of all classes,
// weighted, if labels are smoothed.
template <bool SMOOTHED>
__device__ __forceinline__ double store_gradient(
    Piece* pixel, int label, int classes, int pieces, const LogitGradient<float>& gradient,
    const LogSoftmax& log_softmax, float reciprocal) {
    const float factor = gradient.factor(label);
    double spread = 0;
    auto gradient_of = [&](int k, int label, float logit) {
        const float softmax = exponential(logit - log_softmax.highest) * reciprocal;
        return SMOOTHED ? gradient.of(k, label, factor, softmax) : factor * (k == label ? softmax - 1 : softmax);
    };
    const float of_label = gradient_of(label, label, (float)((const storage_t*)pixel)[label]);
    for (int p = 0; p < pieces; ++p) {
        Values values = values_of(pixel[p]);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const int k = p * PIECE + i;
            if (SMOOTHED && k < classes) spread += weight_of(gradient.class_weights, k) * log_softmax.of(values.of[i]);
            values.of[i] = gradient_of(SMOOTHED && k >= classes ? 0 : k, -1, values.of[i]);
        }
        if ((p + 1) * PIECE > classes)
#pragma unroll
            for (int i = 0; i < PIECE; ++i)
                if (p * PIECE + i >= classes) values.of[i] = 0;
        pixel[p] = piece_of(values);
    }
    ((storage_t*)pixel)[label] = storage_t(of_label);
    return spread;
}

// The weighted loss of a pixel, whose logits its gradient replaces. The label is looked at late: it is on its way.
__device__ inline double loss_to_gradient(
    Piece* pixel, int label, int classes, int pieces, const LogitGradient<float>& gradient) {
    float highest = values_of(pixel[0]).of[0], sum = 0;
    for_each_class(pixel, classes, [&](float logit) { highest = max(highest, logit); });
    for_each_class(pixel, classes, [&](float logit) { sum += exponential(logit - highest); });
    if (label >= classes) {
        for (int p = 0; p < pieces; ++p) pixel[p] = {{0, 0, 0, 0}};
        return 0;
    }
    const LogSoftmax log_softmax = {highest, log(sum)};
    const float of_label = log_softmax.of((float)((const storage_t*)pixel)[label]);
    const double smoothing = gradient.smoothing, weight = weight_of(gradient.class_weights, label);
    double spread = 0;
    if (smoothing > 0)
        spread = store_gradient<true>(pixel, label, classes, pieces, gradient, log_softmax, 1 / sum);
    else
        store_gradient<false>(pixel, label, classes, pieces, gradient, log_softmax, 1 / sum);
    return -(1 - smoothing) * weight * of_label - smoothing / classes * spread;
}

// Launch: grid blocks, block THREADS
extern "C" __global__ void softmax_cross_entropy(
    const storage_t* __restrict__ logits,              // (pixels, padded)
    const uint8* __restrict__ labels,                  // (pixels)
    const float* __restrict__ OPTIONAL class_weights,  // (classes)
    const double* __restrict__ reciprocal,             // (1)
    storage_t* __restrict__ dlogits,                   // (pixels, padded)
    double* __restrict__ partials,                     // (blocks, 1): weighted loss
    int64 pixels, int classes, int padded, int blocks, double smoothing) {
    const LogitGradient<float> gradient(class_weights, classes, reciprocal[0], smoothing);
    const int pieces = padded / PIECE;
    double own[1] = {0};
    block_for_each_staged<THREADS>(
        (const Piece*)logits, (Piece*)dlogits, pixels, pieces, [&](Piece* pixel, int64 number) {
            own[0] += loss_to_gradient(pixel, labels[number], classes, pieces, gradient);
        });
    block_store_sums<THREADS>(own, partials);
}

// Launch: grid 1, block THREADS
extern "C" __global__ void softmax_cross_entropy_merge(
    const double* __restrict__ partials,    // (blocks, 1)
    const double* __restrict__ reciprocal,  // (1)
    float* __restrict__ loss,               // (1)
    int blocks) {
    const double total = block_total<THREADS>(partials, blocks, 1);
    if (threadIdx.x == 0) loss[0] = (float)(total * reciprocal[0]);
}
