// A tile of a matrix product in the registers of a warp, computed by tensor cores; and how operands lie in shared memory
// so that neither storing nor loading them meets a bank twice.
//
// MULTIPLY says how numbers are multiplied; sums are float32 in every case:
//
//   TF32    float32 rounded to tf32, 11 significant bits: a relative error of up to 2^-11 for each factor
//   TF32X3  a float32 is the sum of two tf32, big and small, but for 2^-22 of it; of the four products of a pair the
//           three larger ones are added: float32's accuracy for three instructions instead of one. (An infinite factor
//           gives NaN, since its small part is infinity - infinity.) Tensor cores add with bits cut off, which over
//           4608 terms would cost 30 times what roundings do: they add 16 terms of a sum, ordinary additions the rest.
//   BF16    bfloat16 as stored
//
// All three consume 32 bytes of depth an instruction, 8 float32 or 16 bfloat16, and hold the same number of registers,
// so that one kernel serves them all.
#pragma once
#include "mma.cuh"
#include "piece.cuh"

// What one instruction step of a warp's tile needs: M times 16 rows of the left factor, N times 8 columns of the right.
template <int M, int N>
struct Fragments {
    unsigned a[M][4], b[N][2];
};

template <int ROWS, int COLUMNS>
struct WarpTile {
    static constexpr int M = ROWS / 16, N = COLUMNS / 8;
    typedef Fragments<M, N> Step;
    float sums[M][N][4];

    __device__ WarpTile() {
#pragma unroll
        for (int i = 0; i < M * N * 4; ++i) sums[i / 4 / N][i / 4 % N][i % 4] = 0;
    }

    // Row and column, in the tile, of sums[m][n][i].
    __device__ static int row(int m, int i) { return 16 * m + warp_lane() / 4 + i / 2 * 8; }
    __device__ static int column(int n, int i) { return 8 * n + 2 * (warp_lane() % 4) + i % 2; }

    template <bool MOVED = false>  // do the numbers change their registers when they are rounded?
    __device__ void add_product(Step& f) {
        if constexpr (MULTIPLY == TF32X3) {
            unsigned small_b[N][2];
#pragma unroll
            for (int n = 0; n < N; ++n) split(f.b[n], small_b[n]);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                unsigned small_a[4];
                split(f.a[m], small_a);
                // The small products first: they would be lost one by one in a large sum.
                mma_m16n8k8_tf32(sums[m], small_a, f.b);
                mma_m16n8k8_tf32(sums[m], f.a[m], small_b);
                mma_m16n8k8_tf32(sums[m], f.a[m], f.b);
            }
        } else if constexpr (MULTIPLY == TF32) {
#pragma unroll
            for (int i = 0; i < 4 * M; ++i) f.a[i / 4][i % 4] = rounded<MOVED>(f.a[i / 4][i % 4]);
#pragma unroll
            for (int i = 0; i < 2 * N; ++i) f.b[i / 2][i % 2] = rounded<MOVED>(f.b[i / 2][i % 2]);
#pragma unroll
            for (int m = 0; m < M; ++m) mma_m16n8k8_tf32(sums[m], f.a[m], f.b);
        } else {
#pragma unroll
            for (int m = 0; m < M; ++m) mma_m16n8k16_bf16(sums[m], f.a[m], f.b);
        }
    }

    // The product of a step by itself, its sum taken over at once where tensor cores are not to add up more.
    __device__ void add_step(Step& f) {
        if constexpr (MULTIPLY == TF32X3) {
            WarpTile part;
            part.add_product(f);
            add(part);
        } else {
            add_product(f);
        }
    }
    __device__ void add(const WarpTile& other) {
#pragma unroll
        for (int i = 0; i < M * N * 4; ++i) sums[i / 4 / N][i / 4 % N][i % 4] += other.sums[i / 4 / N][i / 4 % N][i % 4];
    }

private:
    // To tf32, of which the tensor core ignores the low bits. to_tf32 is an addition in place, under a predicate; what
    // must move as well, as pieces of wgrad do, is there with a sum of two.
    template <bool MOVED>
    __device__ static unsigned rounded(unsigned bits) {
        const float number = __uint_as_float(bits);
        return MOVED ? bits + (number == number ? 0x1000 : 0) : to_tf32(number);
    }
    // float32 in, its big part out. Of the small part, 12 bits and a sign, the tensor core takes the first 11. A NaN need
    // not be one in its big part, since it is one in its small part.
    template <int COUNT>
    __device__ static void split(unsigned (&numbers)[COUNT], unsigned (&small)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float number = __uint_as_float(numbers[i]);
            numbers[i] = (numbers[i] + 0x1000) & 0xFFFFE000;
            small[i] = __float_as_uint(number - __uint_as_float(numbers[i]));
        }
    }
};

#define STEP_BYTES 32                                     // of depth: one instruction
#define STEP_DEPTH (STEP_BYTES / (int)sizeof(storage_t))  // numbers
#define STEPS_OF_PART 2                                   // of float32: what tensor cores add up
#define DEPTH_BYTES 128                                   // of depth: one stage of the pipeline
#define DEPTH (DEPTH_BYTES / (int)sizeof(storage_t))      // numbers

// How an operand lies in shared memory, and which of its rows (columns, of the right factor) a thread holds:
//
//   load(a, operand, row, step)      fragments a of M times 16 rows from `row` on, in `step` of the stage
//   load(b, operand, column, step)   fragments b of N times 8 columns
//   row(m, i), column<N>(n, i)       of sums[m][n][i], in the warp's tile

// The depth is contiguous: rows of 128 bytes, the 8 pieces of each exchanged by the row's number, so that 8 threads that
// write a row, and the 8 rows of a matrix that ldmatrix reads, lie in all 32 banks.
struct DepthContiguous {
    __device__ static int offset(int row, int piece) { return row * DEPTH_BYTES + ((piece ^ (row & 7)) * PIECE_BYTES); }

    template <int M>
    __device__ static void load(unsigned (&a)[M][4], const char* operand, int row, int step) {
        const int lane = warp_lane();
#pragma unroll
        for (int m = 0; m < M; ++m)
            ldmatrix_x4(a[m][0], a[m][1], a[m][2], a[m][3], operand + offset(row + 16 * m + lane % 16, 2 * step + lane / 16));
    }
    template <int N>
    __device__ static void load(unsigned (&b)[N][2], const char* operand, int row, int step) {
        const int lane = warp_lane();
#pragma unroll
        for (int n = 0; n < N; n += 2)
            ldmatrix_x4(b[n][0], b[n][1], b[n + 1][0], b[n + 1][1],
                        operand + offset(row + 8 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    }
};

// The depth runs down: WIDTH numbers of one depth are contiguous, of which a warp multiplies WARP_WIDTH.
template <int WIDTH, int WARP_WIDTH, bool WORDS = sizeof(storage_t) == 4>
struct DepthDown;

// Of bfloat16, which ldmatrix transposes.
template <int WIDTH, int WARP_WIDTH>
struct DepthDown<WIDTH, WARP_WIDTH, false> {
    static constexpr bool ADJACENT = false;
    __device__ static int offset(int depth, int piece) {
        return depth * WIDTH * (int)sizeof(storage_t) + ((piece ^ (depth & 7)) * PIECE_BYTES);
    }
    template <int M>
    __device__ static void load(unsigned (&a)[M][4], const char* operand, int column, int step) {
        const int lane = warp_lane();
#pragma unroll
        for (int m = 0; m < M; ++m)
            ldmatrix_x4_trans(a[m][0], a[m][1], a[m][2], a[m][3],
                              operand + offset(STEP_DEPTH * step + lane / 16 * 8 + lane % 8, column / PIECE + 2 * m + lane / 8 % 2));
    }
    template <int N>
    __device__ static void load(unsigned (&b)[N][2], const char* operand, int column, int step) {
        const int lane = warp_lane();
#pragma unroll
        for (int n = 0; n < N; n += 2)
            ldmatrix_x4_trans(b[n][0], b[n][1], b[n + 1][0], b[n + 1][1],
                              operand + offset(STEP_DEPTH * step + lane % 16, column / PIECE + n + lane / 16));
    }
    template <int M>
    __device__ static int row(int m, int i) {
        return 16 * m + warp_lane() / 4 + i / 2 * 8;
    }
    template <int N>
    __device__ static int column(int n, int i) {
        return 8 * n + 2 * (warp_lane() % 4) + i % 2;
    }
};

// Of float32, which ldmatrix.trans would tear into halves. Which row of the tile is which of an instruction is free to
// choose: a thread takes neighbouring ones, 2 M rows or N columns, so that one load of 16 bytes brings four numbers. Eight
// lanes at a time are served such a load, four depths of two neighbouring runs of one piece or two: pieces are exchanged so
// that these lie in all banks.
template <int WIDTH, int WARP_WIDTH>
struct DepthDown<WIDTH, WARP_WIDTH, true> {
    static constexpr bool ADJACENT = true;  // the four rows of sums[m] and sums[m + 1], m even
    __device__ static int offset(int depth, int piece) {
        const int exchange = WARP_WIDTH == 64 ? (depth & 1) | (depth & 2) << 1 : (depth & 3) << 1;
        return depth * WIDTH * (int)sizeof(storage_t) + ((piece ^ exchange) * PIECE_BYTES);
    }
    template <int M>
    __device__ static void load(unsigned (&a)[M][4], const char* operand, int column, int step) {
#pragma unroll
        for (int i = 0; i < M; ++i) {
            const int half = i % 2, m = i - half;
            const Piece piece = piece_at(operand, column, m / 2, step, half);
#pragma unroll
            for (int j = 0; j < 4; ++j) a[m + j / 2][j % 2 + 2 * half] = piece.words[j];
        }
    }
    template <int N>
    __device__ static void load(unsigned (&b)[N][2], const char* operand, int column, int step) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const int half = i % 2, n = 4 * (i / 2);
            const Piece piece = piece_at(operand, column, i / 2, step, half);
#pragma unroll
            for (int j = 0; j < 4; ++j) b[n + j][half] = piece.words[j];
        }
    }
    template <int M>
    __device__ static int row(int m, int i) {
        return warp_lane() / 4 * 2 * M + 2 * m + i / 2;
    }
    template <int N>
    __device__ static int column(int n, int i) {
        return (2 * (warp_lane() % 4) + i % 2) * N + n;
    }

private:
    // Of the thread's run, piece `i` at its depth in a half of the step.
    __device__ static Piece piece_at(const char* operand, int column, int i, int step, int half) {
        const int g = warp_lane() / 4, t = warp_lane() % 4;
        const char* const from = operand + offset(STEP_DEPTH * step + 4 * half + t, (column + g * (WARP_WIDTH / 8)) / PIECE + i);
        return load_piece((const storage_t*)from);
    }
};

// Adds to a warp's tile the product of a stage: `left` and `right` are its operands, in which the warp's part begins at
// `row` and `column`.
template <class Operands, int ROWS, int COLUMNS>
__device__ void add_stage(WarpTile<ROWS, COLUMNS>& tile, const char* left, const char* right, int row, int column) {
    typedef WarpTile<ROWS, COLUMNS> Tile;
    constexpr int STEPS = DEPTH_BYTES / STEP_BYTES;
    auto load = [&](typename Tile::Step& f, int step) {
        Operands::Left::load(f.a, left, row, step);
        Operands::Right::load(f.b, right, column, step);
    };
    if constexpr (MULTIPLY == TF32X3) {
#pragma unroll 1
        for (int first = 0; first < STEPS; first += STEPS_OF_PART) {
            Tile part;
#pragma unroll
            for (int i = 0; i < STEPS_OF_PART; ++i) {
                typename Tile::Step fragments;
                load(fragments, first + i);
                part.add_product(fragments);
            }
            tile.add(part);
        }
    } else {  // the fragments of the next step are loaded while the tensor cores work on this one
        typename Tile::Step fragments[2];
        load(fragments[0], 0);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (step + 1 < STEPS) load(fragments[(step + 1) % 2], step + 1);
            tile.template add_product<Operands::MOVED>(fragments[step % 2]);
        }
    }
}
