// The end of a fused convolution whose depth was split (conv2d_fused.cu): the sums of its parts are added in their order,
// then come bias, ReLU and max-pool, as in an epilogue.
// Element types: tf32, tf32x3, bf16; sm_80 and newer.
//
// Threads: a piece of a pixel, or of a window where the rows of the product come by windows; grid-stride. No sums over
// threads: any order.
#include "common/packed_codes.cuh"

// A piece of one row of z: the sums of all chunks in their order, the bias, rounded, ReLU.
struct Merge {
    const accumulate_t *partials, *bias;
    int64 rows;
    int o, chunks;
    bool with_relu;
    __device__ Piece piece(int64 row, int output) const {
        Values z = {};
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const Values sums = channels_of(partials + (chunk * rows + row) * o, output);
#pragma unroll
            for (int i = 0; i < PIECE; ++i) z.of[i] += sums.of[i];
        }
        const Values shift = channels_of(bias, output);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) z.of[i] += shift.of[i];
        return with_relu ? relu(piece_of(z)) : piece_of(z);
    }
};

extern "C" __global__ void conv2d_fused_merge(
    const accumulate_t* __restrict__ partials,  // (chunks, rows, o)
    const accumulate_t* __restrict__ bias,      // (o)
    storage_t* __restrict__ y,                  // (n, out_h, out_w, o)
    uint8* __restrict__ OPTIONAL pool_codes,    // (n, out_h, out_w, o / 4)
    int n, int oh, int ow, int out_h, int out_w, int o, int rows, int chunks, int with_relu) {
    const Merge merge = {partials, bias, rows, o, chunks, with_relu != 0};
    const int across = o / PIECE;
    FOR_EACH_INDEX(i, (int64)n * out_h * out_w * across) {
        const int64 pixel = i / across, element = i * PIECE;
        const int output = (int)(i - pixel * across) * PIECE;
        if (!pool_codes) {
            store_piece(y + element, merge.piece(pixel, output));
            continue;
        }
        const int64 line = pixel / out_w;
        const int column = (int)(pixel - line * out_w) * 2, row = (int)(line % out_h) * 2;
        PooledPiece pool(merge.piece(4 * pixel, output));
        for (int code = 1; code < 4; ++code)
            if (column + code % 2 < ow && row + code / 2 < oh) pool.offer(merge.piece(4 * pixel + code, output), code);
        store_piece(y + element, pool.piece());
        store_codes(pool_codes, element, pool.codes());
    }
}
