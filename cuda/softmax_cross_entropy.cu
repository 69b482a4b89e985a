// Softmax cross-entropy of the fused engine: loss and gradient in one pass over the logits. Formulas: cross_entropy.cu.
// Element types: float32, bfloat16.
//
// Logits (pixels, padded): `classes` of them, then padding up to whole pieces of 16 bytes, which is not looked at and
// whose gradient is 0. The gradient needs the normaliser first, which depends on the labels alone (1 byte a pixel):
// they are counted before.
//
// Every logit is read once and every gradient written once, by way of shared memory: neighbouring threads move
// neighbouring pieces, and then each thread has a pixel for itself. Its three passes (maximum, sum of exponentials,
// gradient, which takes the logits' place) meet shared memory alone. A pixel begins an odd number of pieces after the
// one before, so that eight threads, which is what 16-byte accesses go by, meet every bank once.
//
// Sums are carried in double: blocks make partial results in a fixed order, which one block adds up. The grid depends on
// the shape alone. Threads: a piece, or a pixel, each; a block takes its share of pixels in steps of as many as fit.
#include "common/piece.cuh"
#include "common/reduce.cuh"
#include "common/softmax.cuh"

#define THREADS 256
#define STAGE (THREADS * 7)  // 28 KiB: a pixel a thread up to 28 float32 or 56 bfloat16 channels; else fewer

// partials[block][number] of this block.
template <int COUNT>
__device__ void block_store_sums(const double (&own)[COUNT], double* partials) {
    for (int i = 0; i < COUNT; ++i) {
        const double sum = block_sum<THREADS>(own[i]);
        if (threadIdx.x == 0) partials[(int64)blockIdx.x * COUNT + i] = sum;
    }
}

// Launch: grid blocks, block THREADS
extern "C" __global__ void softmax_cross_entropy_count(
    const uint8* __restrict__ labels,                  // (pixels)
    const float* __restrict__ OPTIONAL class_weights,  // (classes)
    double* __restrict__ partials,                     // (blocks, 2): weights, valid pixels
    int64 pixels, int classes, int blocks) {
    double own[2] = {0, 0};
    FOR_EACH_INDEX(pixel, pixels) {
        const int label = labels[pixel];
        if (label >= classes) continue;
        own[0] += weight_of(class_weights, label);
        own[1] += 1;
    }
    block_store_sums(own, partials);
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
    SHARED_ARRAY(Piece, stage, [STAGE]);
    const LogitGradient<float> gradient(class_weights, classes, reciprocal[0], smoothing);
    const int pieces = padded / PIECE, stride = pieces | 1;
    const int at_once = min(THREADS, STAGE / stride);
    double own[1] = {0};
    for (int64 first = (int64)blockIdx.x * at_once; first < pixels; first += (int64)gridDim.x * at_once) {
        const int count = (int)min((int64)at_once, pixels - first);
        const Piece* const from = (const Piece*)(logits + first * padded);
        for (int i = threadIdx.x; i < count * pieces; i += THREADS) stage[i / pieces * stride + i % pieces] = from[i];
        __syncthreads();
        if (threadIdx.x < count) {
            const int label = labels[first + threadIdx.x];
            own[0] += loss_to_gradient(stage + threadIdx.x * stride, label, classes, pieces, gradient);
        }
        __syncthreads();
        // What a thread stores here is where it loads next: no barrier lies between.
        Piece* const to = (Piece*)(dlogits + first * padded);
        for (int i = threadIdx.x; i < count * pieces; i += THREADS) to[i] = stage[i / pieces * stride + i % pieces];
    }
    block_store_sums(own, partials);
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
