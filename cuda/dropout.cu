// Dropout with a mask that is a function of (seed, step, layer, sample, element) alone, so that every device, every
// batch split and every resumed run drops the same elements, and backward needs no saved mask.
//
//   y = x / (1 - p) where u >= p, else 0;  u uniform in [0, 1)        backward: the same map applied to dy
//
// u comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): one call gives
// four 32-bit numbers, for the elements 4 i ... 4 i + 3 of a sample.
//   counter (i, sample, layer, step), key (low and high half of the seed)
// Threads: four neighbouring elements each, grid-stride over a sample; blockIdx.y is the sample in the batch.
// `state` holds (seed, step) in device memory, because the step changes between launches of a captured graph.
#include "common/types.cuh"

struct Philox {
    unsigned words[4];
    __device__ Philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3, unsigned key0, unsigned key1) {
        for (int round = 0; round < 10; ++round) {
            const unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
            const unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
            c0 = high1 ^ c1 ^ key0;
            c1 = low1;
            c2 = high0 ^ c3 ^ key1;
            c3 = low0;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        words[0] = c0;
        words[1] = c1;
        words[2] = c2;
        words[3] = c3;
    }
};

// Launch: grid ((per_sample + 1023) / 1024, n), block 256
extern "C" __global__ void dropout_forward(
    const storage_t* __restrict__ x,   // (n, per_sample)
    const uint64* __restrict__ state,  // (2): seed, step
    storage_t* __restrict__ y,         // (n, per_sample)
    int n, int64 per_sample, int layer, accumulate_t p) {
    const uint64 seed = state[0];
    const unsigned step = (unsigned)state[1], sample = blockIdx.y;
    const accumulate_t scale = 1 / (1 - p);
    // u < p in integers: exact, and the same for every element type.
    const double threshold = (double)p * 4294967296.0;
    FOR_EACH_INDEX(group, (per_sample + 3) / 4) {
        const Philox random((unsigned)group, sample, (unsigned)layer, step, (unsigned)seed, (unsigned)(seed >> 32));
        for (int word = 0; word < 4; ++word) {
            const int64 element = group * 4 + word;
            if (element >= per_sample) break;
            const int64 i = sample * per_sample + element;
            y[i] = (double)random.words[word] < threshold ? storage_t(0) : storage_t(x[i] * scale);
        }
    }
}
