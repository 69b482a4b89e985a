// Softmax cross-entropy of the fused engine: loss and gradient in one pass over the logits (formulas: cross_entropy.cu).
// Element types: float32, bfloat16.
//
// Logits (pixels, padded): `classes` of them, then padding up to whole pieces of 16 bytes, whose gradient is 0. The
// gradient needs the normaliser first, which depends on the labels alone (1 byte a pixel): they are counted before.
// Then logits are read once, dlogits written once, 16 bytes at a time; of the three passes over a pixel's logits
// (maximum, sum of exponentials, gradient) two find them in the cache.
//
// Sums are carried in double: blocks make partial results in a fixed order, which one block adds up. The grid depends on
// the shape alone. Threads: one pixel each, grid-stride.
#include "common/packed_codes.cuh"
#include "common/reduce.cuh"

#define THREADS 256
#define VOID_LABEL 255

__device__ inline double weight_of(const float* class_weights, int k) { return class_weights ? (double)class_weights[k] : 1.0; }

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
    const uint8* __restrict__ labels,                // (pixels)
    const float* __restrict__ OPTIONAL class_weights,  // (classes)
    double* __restrict__ partials,                   // (blocks, 2): weights, valid pixels
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

// 1 / normaliser, or 0 where there is no valid pixel.
// Launch: grid 1, block THREADS
extern "C" __global__ void softmax_cross_entropy_normalise(
    const double* __restrict__ partials,  // (blocks, 2)
    double* __restrict__ reciprocal,      // (1)
    int blocks, int by_valid) {
    double own = 0;
    for (int block = threadIdx.x; block < blocks; block += THREADS) own += partials[block * 2 + by_valid];
    const double normaliser = block_sum<THREADS>(own);
    if (threadIdx.x == 0) reciprocal[0] = normaliser > 0 ? 1 / normaliser : 0.0;
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
    double all_weights = 0;
    if (smoothing > 0)
        for (int k = 0; k < classes; ++k) all_weights += weight_of(class_weights, k);
    const double share = reciprocal[0] * smoothing / classes;
    const int pieces = padded / PIECE;
    double own[1] = {0};
    FOR_EACH_INDEX(pixel, pixels) {
        const int label = labels[pixel];
        const Piece* const z = (const Piece*)(logits + pixel * padded);
        Piece* const dz = (Piece*)(dlogits + pixel * padded);
        if (label >= classes) {
            for (int p = 0; p < pieces; ++p) dz[p] = {{0, 0, 0, 0}};
            continue;
        }
        float highest = values_of(z[0]).of[0], sum = 0, of_label = 0;
        for (int p = 0; p < pieces; ++p) {
            const Values values = values_of(z[p]);
#pragma unroll
            for (int i = 0; i < PIECE; ++i)
                if (p * PIECE + i < classes) {
                    highest = max(highest, values.of[i]);
                    if (p * PIECE + i == label) of_label = values.of[i];
                }
        }
        for (int p = 0; p < pieces; ++p) {
            const Values values = values_of(z[p]);
#pragma unroll
            for (int i = 0; i < PIECE; ++i)
                if (p * PIECE + i < classes) sum += exp(values.of[i] - highest);
        }
        const float log_sum = log(sum);
        const double weight = weight_of(class_weights, label);
        const float factor = (float)(reciprocal[0] * (1 - smoothing) * weight);
        own[0] -= (1 - smoothing) * weight * ((of_label - highest) - log_sum);
        for (int p = 0; p < pieces; ++p) {
            const Values values = values_of(z[p]);
            Values gradient;
#pragma unroll
            for (int i = 0; i < PIECE; ++i) {
                const int k = p * PIECE + i;
                gradient.of[i] = 0;
                if (k >= classes) continue;
                const float log_softmax = (values.of[i] - highest) - log_sum, softmax = exp(log_softmax);
                gradient.of[i] = factor * (softmax - (k == label ? 1 : 0));
                if (smoothing > 0) {
                    own[0] -= smoothing / classes * weight_of(class_weights, k) * log_softmax;
                    gradient.of[i] += (float)(share * (all_weights * softmax - weight_of(class_weights, k)));
                }
            }
            dz[p] = piece_of(gradient);
        }
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
