// Convolution, the rung `direct`: one thread computes one element by its definition.
//
//   fprop  y[n,oy,ox,o]      = bias[o] + sum_{ky,kx,c} x[n, oy s - p + ky, ox s - p + kx, c] weight[o,ky,kx,c]
//   dgrad  dx[n,iy,ix,c]     = sum_{ky,kx,o} dy[n,oy,ox,o] weight[o,ky,kx,c]   over all oy s - p + ky = iy, ox s - p + kx = ix
//   wgrad  dweight[o,ky,kx,c]= sum_{n,oy,ox} dy[n,oy,ox,o] x[n, oy s - p + ky, ox s - p + kx, c]
//
// Any kernel size, stride and padding. Every input is read from global memory kernel-size or channel-count times: this
// rung is for small shapes, for reading, and for checking the other rungs.
// Threads: one output element each, grid-stride, the contiguous dimension fastest. Each sum is carried by one thread in
// a fixed order.
#include "common/types.cuh"

extern "C" __global__ void conv2d_forward_direct(
    const storage_t* __restrict__ x,              // (n, h, w, c)
    const storage_t* __restrict__ weight,         // (o, kh, kw, c)
    const storage_t* __restrict__ OPTIONAL bias,  // (o)
    storage_t* __restrict__ y,                    // (n, oh, ow, o)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int stride, int padding) {
    const int64 count = (int64)n * oh * ow * o;
    FOR_EACH_INDEX(i, count) {
        const int output = (int)(i % o);
        const int64 pixel = i / o;
        const int ox = (int)(pixel % ow), oy = (int)(pixel / ow % oh);
        const storage_t* const image = x + pixel / ow / oh * h * w * c;
        accumulate_t sum = bias ? (accumulate_t)bias[output] : 0;
        for (int ky = 0; ky < kh; ++ky) {
            const int iy = oy * stride - padding + ky;
            if (iy < 0 || iy >= h) continue;
            for (int kx = 0; kx < kw; ++kx) {
                const int ix = ox * stride - padding + kx;
                if (ix < 0 || ix >= w) continue;
                const storage_t* const source = image + ((int64)iy * w + ix) * c;
                const storage_t* const tap_weights = weight + (((int64)output * kh + ky) * kw + kx) * c;
                for (int k = 0; k < c; ++k) sum = fma((accumulate_t)source[k], (accumulate_t)tap_weights[k], sum);
            }
        }
        y[i] = sum;
    }
}

extern "C" __global__ void conv2d_backward_data_direct(
    const storage_t* __restrict__ dy,      // (n, oh, ow, o)
    const storage_t* __restrict__ weight,  // (o, kh, kw, c)
    storage_t* __restrict__ dx,            // (n, h, w, c)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int stride, int padding) {
    const int64 count = (int64)n * h * w * c;
    FOR_EACH_INDEX(i, count) {
        const int channel = (int)(i % c);
        const int64 pixel = i / c;
        const int ix = (int)(pixel % w), iy = (int)(pixel / w % h);
        const storage_t* const image = dy + pixel / w / h * oh * ow * o;
        accumulate_t sum = 0;
        for (int ky = 0; ky < kh; ++ky) {
            // oy * stride, if any output row reads this input row with this tap
            const int scaled_y = iy + padding - ky;
            if (scaled_y < 0 || scaled_y % stride || scaled_y / stride >= oh) continue;
            for (int kx = 0; kx < kw; ++kx) {
                const int scaled_x = ix + padding - kx;
                if (scaled_x < 0 || scaled_x % stride || scaled_x / stride >= ow) continue;
                const storage_t* const source = image + ((int64)(scaled_y / stride) * ow + scaled_x / stride) * o;
                const storage_t* const tap_weights = weight + ((int64)ky * kw + kx) * c + channel;
                for (int k = 0; k < o; ++k)
                    sum = fma((accumulate_t)source[k], (accumulate_t)tap_weights[(int64)k * kh * kw * c], sum);
            }
        }
        dx[i] = sum;
    }
}

extern "C" __global__ void conv2d_backward_weight_direct(
    const storage_t* __restrict__ x,   // (n, h, w, c)
    const storage_t* __restrict__ dy,  // (n, oh, ow, o)
    storage_t* __restrict__ dweight,   // (o, kh, kw, c)
    int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int stride, int padding) {
    const int64 count = (int64)o * kh * kw * c;
    FOR_EACH_INDEX(i, count) {
        const int channel = (int)(i % c), kx = (int)(i / c % kw), ky = (int)(i / c / kw % kh);
        const int output = (int)(i / c / kw / kh);
        accumulate_t sum = 0;
        for (int image = 0; image < n; ++image)
            for (int oy = 0; oy < oh; ++oy) {
                const int iy = oy * stride - padding + ky;
                if (iy < 0 || iy >= h) continue;
                accumulate_t row = 0;  // one row at a time: shorter sums lose less
                for (int ox = 0; ox < ow; ++ox) {
                    const int ix = ox * stride - padding + kx;
                    if (ix < 0 || ix >= w) continue;
                    const accumulate_t gradient = dy[(((int64)image * oh + oy) * ow + ox) * o + output];
                    row = fma(gradient, (accumulate_t)x[(((int64)image * h + iy) * w + ix) * c + channel], row);
                }
                sum += row;
            }
        dweight[i] = sum;
    }
}
