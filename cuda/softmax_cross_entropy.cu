// Softmax cross-entropy of the fused engine: loss and gradient in one pass over the logits. Formulas: cross_entropy.cu.
// Element types: float32, bfloat16.
//
// Logits (pixels, padded): `classes` of them, then padding up to whole pieces of 16 bytes, which is not looked at and
// whose gradient is 0. The gradient needs the normaliser first, which depends on the labels alone (1 byte a pixel):
// they are counted before.
//
// Every logit is read once and every gradient written once, by way of shared memory (common/staged.cuh). A thread's three
// passes over its pixel (maximum, sum of exponentials, gradient, which takes the logits' place) meet shared memory alone.
//
// 16x224x224 of 24 bfloat16 logits are 77 MB read and written, 23 us at 80 % of an H200's 4.25 TB/s. Registers leave
// room for five blocks of 256 threads with three pieces under way: 61 KB on a multiprocessor, where 29 are needed. Not measured as
// it is; the loss took 70 us before, with its four launches.
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
    double own = 0;
    for (int block = threadIdx.x; block < blocks; block += THREADS) own += partials[block * 2 + by_valid];
    const double normaliser = block_sum<THREADS>(own);
    if (threadIdx.x == 0) reciprocal[0] = normaliser != 0 ? (share ? share[0] : 1) / normaliser : 0.0;
}

// The weighted loss of a pixel, whose logits its gradient replaces.
__device__ inline double loss_to_gradient(
    Piece* pixel, int label, int classes, int pieces, const LogitGradient<float>& gradient) {
    if (label >= classes) {
        for (int p = 0; p < pieces; ++p) pixel[p] = {{0, 0, 0, 0}};
        return 0;
    }
    LogSoftmax log_softmax = {values_of(pixel[0]).of[0], 0};
    for (int p = 0; p < pieces; ++p) {
        const Values values = values_of(pixel[p]);
#pragma unroll
        for (int i = 0; i < PIECE; ++i)
            if (p * PIECE + i < classes) log_softmax.highest = max(log_softmax.highest, values.of[i]);
    }
    float sum = 0;
    for (int p = 0; p < pieces; ++p) {
        const Values values = values_of(pixel[p]);
#pragma unroll
        for (int i = 0; i < PIECE; ++i)
            if (p * PIECE + i < classes) sum += exp(values.of[i] - log_softmax.highest);
    }
    log_softmax.log_sum = log(sum);
    const float factor = gradient.factor(label);
    float of_label = 0;  // log softmax of the label
    double spread = 0;   // and of all classes, weighted, where labels are smoothed
    for (int p = 0; p < pieces; ++p) {
        Values values = values_of(pixel[p]);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const int k = p * PIECE + i;
            if (k >= classes) {
                values.of[i] = 0;
                continue;
            }
            const float logarithm = log_softmax.of(values.of[i]);
            if (k == label) of_label = logarithm;
            if (gradient.smoothing > 0) spread += weight_of(gradient.class_weights, k) * logarithm;
            values.of[i] = gradient.of(k, label, factor, exp(logarithm));
        }
        pixel[p] = piece_of(values);
    }
    const double smoothing = gradient.smoothing, weight = weight_of(gradient.class_weights, label);
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
    double own = 0;
    for (int block = threadIdx.x; block < blocks; block += THREADS) own += partials[block];
    const double total = block_sum<THREADS>(own);
    if (threadIdx.x == 0) loss[0] = (float)(total * reciprocal[0]);
}
