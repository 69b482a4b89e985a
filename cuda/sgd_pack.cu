// SGD with momentum over all parameters of a model, which also writes the weights as the fused engine reads them.
// Element types: float32, bfloat16.
//
//   m = momentum m + scale g + decay w;   w = w - rate lr m     (sgd.cu; w, g, m are float32)
//   copy    (padded outputs, taps, planes * channels)   w in planes of bfloat16 (common/planes.cuh)
//   flipped (channels, taps, padded outputs)   flipped[c][taps - 1 - t][o] = w[o][t][c] in storage_t; dgrad is an fprop with it
//
// Outputs beyond those of w stay as they were (0).
//
// A parameter is seen as (outputs, taps, channels); a bias or a vector of batch norm, which lies in a row, as outputs
// of one tap and up to 32 channels. Arrays come by a table of addresses {w, g, m, copy, flipped}, 0 for no copy.
//
// Bytes for each number of a parameter: w, g, m read (12), w, m written (8), 2 for each plane of its copy, 2 (bfloat16) or 4
// (float32) for its flipped copy: 24 for a weight with both in bfloat16, 26 for one in three planes, 20 for a vector.
//
// Of a tile a thread has four rows, whose w, g and m it asks for at once: 48 bytes, and 74 KB for the 1536 threads that a
// multiprocessor holds of it, where 29 are needed (common/in_flight.cuh).
//
// A block looks after 32 outputs x 32 channels of one tap. It reads and writes w, g, m and the copy along the channels
// and, by way of shared memory, writes `flipped` along the outputs: all accesses are runs of 32.
// Threads: (32, 8), every 8th row of the tile. Element-wise: no order to depend on. With `update` 0 it only copies.
// Where the scale is NaN (gradient_norm.cu) nothing moves.
#include "common/planes.cuh"

#define TILE 32
#define ROWS 8

struct Element {
    float w, g, m;
};

// Launch: by its op only, because `addresses` holds pointers
extern "C" __global__ void __launch_bounds__(TILE* ROWS, 4) sgd_pack_step(
    const uint64* __restrict__ addresses,  // (parameters, 5)
    const int* __restrict__ shapes,        // (parameters, 4): outputs, taps, channels, padded outputs
    const double* __restrict__ rates,      // (parameters)
    const double* __restrict__ decays,     // (parameters)
    const int* __restrict__ tiles,         // (tile_count, 4): parameter, first output, tap, first channel
    const double* __restrict__ lr,         // (1)
    const double* __restrict__ scale,      // (1)
    int parameters, int tile_count, int planes, double momentum, int update) {
    if (update && scale[0] != scale[0]) return;
    SHARED_ARRAY(storage_t, turned, [TILE][TILE + 1]);  // a column more, so that its columns lie in different banks
    const int* const tile = tiles + (int64)blockIdx.x * 4;
    const int parameter = tile[0], first_output = tile[1], tap = tile[2], first_channel = tile[3];
    const int* const shape = shapes + parameter * 4;
    const int outputs = shape[0], taps = shape[1], channels = shape[2], padded = shape[3];
    float* const w = (float*)addresses[parameter * 5 + 0];
    const float* const g = (const float*)addresses[parameter * 5 + 1];
    float* const m = (float*)addresses[parameter * 5 + 2];
    bfloat16* const copy = (bfloat16*)addresses[parameter * 5 + 3];
    storage_t* const flipped = (storage_t*)addresses[parameter * 5 + 4];
    const float rate = (float)(lr[0] * rates[parameter]), decay = (float)decays[parameter];
    const float keep = (float)momentum, factor = (float)scale[0];
    const int channel = first_channel + threadIdx.x, rows = channel < channels ? min(TILE, outputs - first_output) : 0;
    auto element = [&](int64 row) { return ((first_output + row) * taps + tap) * channels + channel; };
    auto load = [&](int64 row) {
        const int64 i = element(row);
        return update ? Element{load_here(w + i), load_here(g + i), load_here(m + i)} : Element{load_here(w + i), 0, 0};
    };
    auto copy_planes = [&](float left, bfloat16* to) {
#pragma unroll 1
        for (int k = 0; k < planes; ++k, to += channels) {
            const bfloat16 plane(left);
            *to = plane;
            left = left_by(plane, left);
        }
    };
    for_each_in_flight<TILE / ROWS>(threadIdx.y, rows, ROWS, load, [&](int64 row, const Element& old) {
        const int64 i = element(row);
        float value = old.w;
        if (update) {
            const float velocity = keep * old.m + (factor * old.g + decay * value);
            m[i] = velocity;
            value = value - rate * velocity;
            w[i] = value;
        }
        if (copy) copy_planes(value, copy + ((first_output + row) * taps + tap) * planes * channels + channel);
        turned[row][threadIdx.x] = value;
    });
    if (!flipped) return;  // all threads of the block, which has one parameter
    __syncthreads();
    for (int row = threadIdx.y; row < TILE; row += ROWS) {
        const int output = first_output + threadIdx.x, channel = first_channel + row;
        if (output >= outputs || channel >= channels) continue;
        flipped[((int64)channel * taps + (taps - 1 - tap)) * padded + output] = turned[threadIdx.x][row];
    }
}
