// Softmax cross-entropy over the pixels of a batch; logits seen as (pixels, classes).
//
//   loss of a pixel  l = log sum exp(z - max z) - (z[label] - max z)
//   loss             = sum w[label] l / normaliser, over the pixels whose label is not void (255)
//   normaliser       = sum w[label]       ("weights", as PyTorch)
//                    = number of pixels   ("valid", as the authors' Caffe)
//   backward         dz[k] = dloss w[label] (softmax(z)[k] - [k = label]) / normaliser; 0 at void pixels
//
// Label smoothing s (Szegedy et al., arXiv 1512.00567, section 7) as PyTorch combines it with class weights: in place of
// w[label] l, a pixel counts as
//
//   (1 - s) w[label] l + s / classes  sum_k w[k] (-log softmax(z)[k])
//
// and its gradient is, before dloss / normaliser,
//
//   (1 - s) w[label] (softmax(z)[k] - [k = label]) + s / classes (softmax(z)[k] sum_j w[j] - w[k])
//
// The normaliser stays as it is.
//
// A batch without a valid pixel has loss 0 and gradient 0; weights that are no numbers give a loss that is none. A label that is neither a class nor void counts as void
// here, so that it cannot read outside; it is refused, by name, before it reaches a kernel.
//
// Sums are carried in double: a float stops counting pixels at 2^24. Every block makes a partial result in a fixed
// order, which one block adds up; the grid depends on the shape alone.
// Threads: one pixel each, whose logits pass through shared memory (common/staged.cuh): of 21 float32 classes eight numbers of
// each of 1280 threads are in flight, 41 KB on a multiprocessor, where 29 are needed (common/in_flight.cuh).
#include "common/reduce.cuh"
#include "common/softmax.cuh"
#include "common/staged.cuh"

#define THREADS 256

// 1 / normaliser, or 0 where nothing counts. `divisor` is its place among the sums; 0: nothing is divided.
__device__ inline double reciprocal_of(const double* sums, int divisor) {
    const double normaliser = divisor == 0 ? 1.0 : sums[divisor];
    return normaliser != 0 ? 1 / normaliser : 0.0;
}

// Launch: grid blocks, block THREADS
extern "C" __global__ void cross_entropy_partial(
    const storage_t* __restrict__ logits,                  // (pixels, classes)
    const uint8* __restrict__ labels,                      // (pixels)
    const storage_t* __restrict__ OPTIONAL class_weights,  // (classes)
    double* __restrict__ partials,                         // (blocks, 3): weighted loss, weights, valid pixels
    int64 pixels, int classes, int blocks, double smoothing) {
    double sums[3] = {0, 0, 0}, &loss = sums[0], &weights = sums[1], &valid = sums[2];
    block_for_each_staged<THREADS>(logits, (storage_t*)nullptr, pixels, classes, [&](const storage_t* z, int64 pixel) {
        const int label = labels[pixel];
        if (label >= classes) return;
        const double weight = weight_of(class_weights, label);
        const LogSoftmax log_softmax = log_softmax_of(z, classes);
        loss -= (1 - smoothing) * weight * log_softmax.of(z[label]);
        if (smoothing > 0) {
            double spread = 0;
            for (int k = 0; k < classes; ++k) spread += weight_of(class_weights, k) * log_softmax.of(z[k]);
            loss -= smoothing / classes * spread;
        }
        weights += weight;
        valid += 1;
    });
    block_store_sums<THREADS>(sums, partials);
}

// Launch: grid 1, block THREADS
extern "C" __global__ void cross_entropy_merge(
    const double* __restrict__ partials,  // (blocks, 3)
    double* __restrict__ sums,            // (3): weighted loss, weights, valid pixels
    storage_t* __restrict__ loss,         // (1)
    int blocks, int divisor) {
    for (int i = 0; i < 3; ++i) {
        const double total = block_total<THREADS>(partials + i, blocks, 3);
        if (threadIdx.x == 0) sums[i] = total;
    }
    if (threadIdx.x == 0) loss[0] = (storage_t)(sums[0] * reciprocal_of(sums, divisor));
}

extern "C" __global__ void cross_entropy_backward(
    const storage_t* __restrict__ logits,                  // (pixels, classes)
    const uint8* __restrict__ labels,                      // (pixels)
    const storage_t* __restrict__ OPTIONAL class_weights,  // (classes)
    const double* __restrict__ sums,                       // (3)
    const storage_t* __restrict__ dloss,                   // (1)
    storage_t* __restrict__ dlogits,                       // (pixels, classes)
    int64 pixels, int classes, int divisor, double smoothing) {
    const LogitGradient<storage_t> gradient(class_weights, classes, dloss[0] * reciprocal_of(sums, divisor), smoothing);
    block_for_each_staged<THREADS>(logits, dlogits, pixels, classes, [&](storage_t* z, int64 pixel) {
        const int label = labels[pixel];
        if (label >= classes) {
            for (int k = 0; k < classes; ++k) z[k] = 0;
            return;
        }
        const accumulate_t factor = gradient.factor(label);
        const LogSoftmax log_softmax = log_softmax_of(z, classes);
        for (int k = 0; k < classes; ++k) z[k] = gradient.of(k, label, factor, exp(log_softmax.of(z[k])));
    });
}
