// Bilinear resize of (n, h, w, c) to (n, oh, ow, c), as evaluation does with logits and the "bilinear" decoder with maps:
// pixel centres at half-integers, the border repeated (PyTorch's interpolate(align_corners=False), no antialiasing).
//
//   source position of output row oy:  (oy + 0.5) h / oh - 0.5, clamped to [0, h - 1]
//   forward   y[oy, ox] = sum over iy, ix of  R[oy, iy] C[ox, ix] x[iy, ix]
//   (of a large map some rows at a time, from the rows of x that they are made of)
//   backward  dx[iy, ix] = sum over oy, ox of  R[oy, iy] C[ox, ix] dy[oy, ox]
//
// R and C hold at most two weights per output row or column, 1 - fraction and fraction (struct Tap). The backward gathers:
// a thread walks the outputs that can reach its pixel, in ascending order, and asks each output's Tap for the weight, so
// both directions round the same positions. No atomics, one fixed order of sums.
//
// Threads: one element of y (forward) or dx (backward) each, grid-stride, channels fastest.
#include "common/types.cuh"

struct Tap {
    int low, high;
    accumulate_t fraction;  // weight of `high`
    __device__ Tap(int target, int source_size, int target_size) {
        const accumulate_t scale = (accumulate_t)source_size / target_size;
        accumulate_t position = (target + (accumulate_t)0.5) * scale - (accumulate_t)0.5;
        position = position < 0 ? 0 : position;
        low = min((int)position, source_size - 1);
        high = min(low + 1, source_size - 1);
        fraction = position - low;
    }
};

extern "C" __global__ void resize_bilinear_forward(
    const storage_t* __restrict__ x,  // (n, x_rows, w, c), rows of a map of height h from x_first on
    storage_t* __restrict__ y,        // (n, y_rows, ow, c), rows of a map of height oh from y_first on
    int n, int x_rows, int w, int c, int y_rows, int ow, int x_first, int h, int y_first, int oh) {
    const int64 count = (int64)n * y_rows * ow * c;
    FOR_EACH_INDEX(i, count) {
        const int channel = (int)(i % c);
        const int64 pixel = i / c;
        const Tap column((int)(pixel % ow), w, ow), row(y_first + (int)(pixel / ow % y_rows), h, oh);
        const storage_t* const image = x + pixel / ow / y_rows * x_rows * w * c + channel;
        const storage_t* const above = image + (int64)(row.low - x_first) * w * c;
        const storage_t* const below = image + (int64)(row.high - x_first) * w * c;
        const accumulate_t top =
            above[(int64)column.low * c] +
            column.fraction * ((accumulate_t)above[(int64)column.high * c] - above[(int64)column.low * c]);
        const accumulate_t bottom =
            below[(int64)column.low * c] +
            column.fraction * ((accumulate_t)below[(int64)column.high * c] - below[(int64)column.low * c]);
        y[i] = top + row.fraction * (bottom - top);
    }
}

// The weight of a source index in a target index: an entry of R or C.
__device__ inline accumulate_t weight_of(int source, int target, int source_size, int target_size) {
    const Tap tap(target, source_size, target_size);
    return (tap.low == source ? 1 - tap.fraction : 0) + (tap.high == source ? tap.fraction : 0);
}

// The targets whose position lies between source - 1 and source + 1; rounding can only add one at either end, whose
// weight is 0.
struct Reach {
    int first, last;
    __device__ Reach(int source, int source_size, int target_size) {
        const accumulate_t scale = (accumulate_t)target_size / source_size, half = (accumulate_t)0.5;
        first = max((int)floor((source - half) * scale - half), 0);
        last = min((int)ceil((source + 3 * half) * scale - half), target_size - 1);
    }
};

extern "C" __global__ void resize_bilinear_backward(
    const storage_t* __restrict__ dy,  // (n, oh, ow, c)
    storage_t* __restrict__ dx,        // (n, h, w, c)
    int n, int h, int w, int c, int oh, int ow) {
    const int64 count = (int64)n * h * w * c;
    FOR_EACH_INDEX(i, count) {
        const int channel = (int)(i % c);
        const int64 pixel = i / c;
        const int column = (int)(pixel % w), row = (int)(pixel / w % h);
        const storage_t* const image = dy + pixel / w / h * oh * ow * c + channel;
        const Reach rows(row, h, oh), columns(column, w, ow);
        accumulate_t sum = 0;
        for (int oy = rows.first; oy <= rows.last; ++oy) {
            const accumulate_t v = weight_of(row, oy, h, oh);
            if (v == 0) continue;
            for (int ox = columns.first; ox <= columns.last; ++ox) {
                const accumulate_t u = weight_of(column, ox, w, ow);
                if (u != 0) sum += v * u * image[((int64)oy * ow + ox) * c];
            }
        }
        dx[i] = sum;
    }
}
