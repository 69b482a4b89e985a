// A training batch from decoded pictures of any size: scaled, flipped, cropped or padded, toned, normalised.
//
// Sample i is a picture of sizes[i] = (h, w) whose pixels start at starts[i] of the packed buffers. It is seen through
// views[i] = (sh, sw, top, left, flip): resized to (sh, sw), mirrored if flip, and output pixel (oy, ox) is pixel
// (oy + top, ox + left) of that. Outside of it the image is 0 (the mean colour) and the label void.
//
//   image:  v = sum over source pixels k of t(k) picture[k] / sum t(k),  t(k) = max(0, 1 - |k + 1/2 - centre| / s)
//           in each direction, centre = (position + 1/2) scale, scale = h / sh, s = max(1, scale): bilinear where it
//           grows, and wide enough where it shrinks not to alias (Pillow's BILINEAR, without its rounding to bytes)
//   tone:   v = clip(contrast (v / 255 - 1/2) + 1/2 + brightness, 0, 1) for tones[i] = (contrast, brightness)
//   y:      (v - mean) / std for channels = (mean, std)
//   label:  the nearest source pixel, in integers, so that every device picks the same
//
// Threads: one output pixel each, grid-stride.
#include "common/types.cuh"

#define VOID_LABEL 255

// Which source pixels an output pixel is made of, along one axis.
struct Taps {
    int first, last;
    accumulate_t centre, width;
    __device__ Taps(int position, int source, int scaled) {
        const accumulate_t scale = (accumulate_t)source / scaled;
        centre = (position + (accumulate_t)0.5) * scale;
        width = scale < 1 ? (accumulate_t)1 : scale;
        first = max(0, (int)(centre - width));
        last = min(source - 1, (int)(centre + width));
    }
    __device__ accumulate_t weight(int k) const {
        const accumulate_t distance = k + (accumulate_t)0.5 - centre;
        const accumulate_t w = 1 - (distance < 0 ? -distance : distance) / width;
        return w < 0 ? (accumulate_t)0 : w;
    }
};

__device__ inline int64 nearest(int position, int source, int scaled) {
    return (2 * (int64)position + 1) * source / (2 * (int64)scaled);
}

extern "C" __global__ void augment_forward(
    const uint8* __restrict__ images,        // (pixels, 3)
    const uint8* __restrict__ masks,         // (pixels)
    const int64* __restrict__ starts,        // (n)
    const int* __restrict__ sizes,           // (n, 2)
    const int* __restrict__ views,           // (n, 5)
    const storage_t* __restrict__ tones,     // (n, 2)
    const storage_t* __restrict__ channels,  // (2, 3)
    storage_t* __restrict__ y,               // (n, oh, ow, 3)
    uint8* __restrict__ labels,              // (n, oh, ow)
    int64 pixels, int n, int oh, int ow) {
    const int64 count = (int64)n * oh * ow;
    FOR_EACH_INDEX(i, count) {
        const int64 sample = i / ow / oh;
        const int h = sizes[2 * sample], w = sizes[2 * sample + 1];
        const int* const view = views + 5 * sample;
        const int sh = view[0], sw = view[1];
        const int row = (int)(i / ow % oh) + view[2], column = (int)(i % ow) + view[3];
        if (row < 0 || row >= sh || column < 0 || column >= sw) {
            for (int channel = 0; channel < 3; ++channel) y[3 * i + channel] = 0;
            labels[i] = VOID_LABEL;
            continue;
        }
        const int seen = view[4] ? sw - 1 - column : column;
        const int64 start = starts[sample];
        labels[i] = masks[start + nearest(row, h, sh) * w + nearest(seen, w, sw)];

        const Taps rows(row, h, sh), columns(seen, w, sw);
        accumulate_t sums[3] = {0, 0, 0}, total = 0;
        for (int r = rows.first; r <= rows.last; ++r) {
            const uint8* const line = images + 3 * (start + (int64)r * w);
            for (int c = columns.first; c <= columns.last; ++c) {
                const accumulate_t weight = rows.weight(r) * columns.weight(c);
                total += weight;
                for (int channel = 0; channel < 3; ++channel) sums[channel] += weight * line[3 * c + channel];
            }
        }
        for (int channel = 0; channel < 3; ++channel) {
            const accumulate_t half = (accumulate_t)0.5, value = sums[channel] / (255 * total);
            accumulate_t v = tones[2 * sample] * (value - half) + half + tones[2 * sample + 1];
            v = v < 0 ? (accumulate_t)0 : v > 1 ? (accumulate_t)1 : v;
            y[3 * i + channel] = (v - channels[channel]) / channels[3 + channel];
        }
    }
}
