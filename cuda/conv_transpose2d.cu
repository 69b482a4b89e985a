// Transposed convolution of kernel 4, stride 2, padding 1: the learned upsampling by 2 of FCN (Long, Shelhamer, Darrell,
// arXiv 1411.4038, section 3.3) and of SegNet's "deconv" decoder. Each pixel of x (n, h', w', c) spreads over 4x4 pixels
// of y (n, h, w, o), h' = (h + 1) / 2; what falls outside y is cropped, so odd sizes come back exactly.
//
//   y[Y, X] = sum over i, ky with 2 i - 1 + ky = Y (and j, kx likewise)  of  x[i, j] weight[:, ky, kx, :]
//
// Written as a scatter it would need atomics; written as a gather three of four taps would meet no pixel. Instead, with
// Y + 1 = 2 I + p (p = 0, 1: the parity), only ky = p and ky = p + 2 take part, from pixels I and I - 1. So
//
//   z[I, J, (p, q, o)] = sum over ty, tx in {0, 1} of  x[I - 1 + ty, J - 1 + tx] packed[(p, q, o), ty, tx]
//   packed[(p, q, o), ty, tx, c] = weight[c, p + 2 (1 - ty), q + 2 (1 - tx), o]
//   y[Y, X, o] = z[(Y + 1) / 2, (X + 1) / 2, ((Y + 1) % 2, (X + 1) % 2, o)]
//
// where the first line is an ordinary 2x2 convolution of padding 1 from c to 4 o channels, of which no product is wasted:
// every rung of conv2d, and its dgrad and wgrad, serve here. This file packs the weights and moves pixels between z and y.
//
//   backward  dz = the pixels of dy by parity, 0 where y was cropped; dx = dgrad(dz), dpacked = wgrad(x, dz);
//             dweight = dpacked, unpacked. Packing only permutes, so both are exact inverses.
//
// Threads: one element of the output each, grid-stride, the last dimension fastest. No sums: the result does not depend on
// any order.
#include "common/types.cuh"

// Where the i-th number of a weight (c, 4, 4, o) lies in packed (2, 2, o, 2, 2, c).
__device__ inline int64 packed_index(int64 i, int c, int o) {
    const int output = (int)(i % o), kx = (int)(i / o % 4), ky = (int)(i / o / 4 % 4), channel = (int)(i / o / 16);
    const int p = ky % 2, q = kx % 2, ty = 1 - ky / 2, tx = 1 - kx / 2;
    return (((((int64)p * 2 + q) * o + output) * 2 + ty) * 2 + tx) * c + channel;
}

extern "C" __global__ void conv_transpose2d_pack_weight(
    const storage_t* __restrict__ weight,  // (c, 4, 4, o)
    storage_t* __restrict__ packed,        // (4 * o, 2, 2, c)
    int c, int o) {
    FOR_EACH_INDEX(i, (int64)16 * c * o) packed[packed_index(i, c, o)] = weight[i];
}

extern "C" __global__ void conv_transpose2d_unpack_weight(
    const storage_t* __restrict__ dpacked,  // (4 * o, 2, 2, c)
    storage_t* __restrict__ dweight,        // (c, 4, 4, o)
    int c, int o) {
    FOR_EACH_INDEX(i, (int64)16 * c * o) dweight[i] = dpacked[packed_index(i, c, o)];
}

extern "C" __global__ void conv_transpose2d_forward_interleave(
    const storage_t* __restrict__ z,  // (n, (h + 3) / 2, (w + 3) / 2, 4 * o)
    storage_t* __restrict__ y,        // (n, h, w, o)
    int n, int h, int w, int o) {
    const int64 count = (int64)n * h * w * o;
    const int rows = (h + 3) / 2, columns = (w + 3) / 2;
    FOR_EACH_INDEX(i, count) {
        const int output = (int)(i % o), column = (int)(i / o % w) + 1, row = (int)(i / o / w % h) + 1;
        const int64 pixel = (i / o / w / h * rows + row / 2) * columns + column / 2;
        y[i] = z[(pixel * 4 + row % 2 * 2 + column % 2) * o + output];
    }
}

extern "C" __global__ void conv_transpose2d_backward_separate(
    const storage_t* __restrict__ dy,  // (n, h, w, o)
    storage_t* __restrict__ dz,        // (n, (h + 3) / 2, (w + 3) / 2, 4 * o)
    int n, int h, int w, int o) {
    const int rows = (h + 3) / 2, columns = (w + 3) / 2;
    const int64 count = (int64)n * rows * columns * 4 * o;
    FOR_EACH_INDEX(i, count) {
        const int output = (int)(i % o), parity = (int)(i / o % 4);
        const int64 pixel = i / o / 4;
        const int column = (int)(pixel % columns) * 2 + parity % 2 - 1;
        const int row = (int)(pixel / columns % rows) * 2 + parity / 2 - 1;
        const bool inside = row >= 0 && row < h && column >= 0 && column < w;
        dz[i] = inside ? dy[((pixel / columns / rows * h + row) * w + column) * o + output] : storage_t(0);
    }
}
