// A tile of a matrix product in the registers of a warp, computed by tensor cores; and how operands lie in shared memory
// so that neither storing nor loading them meets a bank twice.
//
// MULTIPLY says how numbers are multiplied; sums are float32 in every case:
//
//   TF32    float32 rounded to tf32, 11 significant bits: a relative error of up to 2^-11 for each factor
//   TF32X3  a float32 is the sum of two tf32, big and small, but for 2^-22 of it; of the four products of a pair the
//           three larger ones are added: nearly float32's accuracy for three instructions instead of one. (An infinite
//           factor gives NaN, since its small part is infinity - infinity.)
//   BF16    bfloat16 as stored
//
// All three consume 32 bytes of depth an instruction, 8 float32 or 16 bfloat16, and hold the same number of registers,
// so that one kernel serves them all.
#pragma once
#include "mma.cuh"
#include "piece.cuh"

enum Multiply { TF32, TF32X3, BF16 };

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
            for (int i = 0; i < 4 * M; ++i) f.a[i / 4][i % 4] = to_tf32(__uint_as_float(f.a[i / 4][i % 4]));
#pragma unroll
            for (int i = 0; i < 2 * N; ++i) f.b[i / 2][i % 2] = to_tf32(__uint_as_float(f.b[i / 2][i % 2]));
#pragma unroll
            for (int m = 0; m < M; ++m) mma_m16n8k8_tf32(sums[m], f.a[m], f.b);
        } else {
#pragma unroll
            for (int m = 0; m < M; ++m) mma_m16n8k16_bf16(sums[m], f.a[m], f.b);
        }
    }

private:
    // float32 in, its big part out.
    template <int COUNT>
    __device__ static void split(unsigned (&numbers)[COUNT], unsigned (&small)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float number = __uint_as_float(numbers[i]);
            numbers[i] = to_tf32(number);
            small[i] = to_tf32(number - __uint_as_float(numbers[i]));
        }
    }
};

#define STEP_BYTES 32                                     // of depth: one instruction
#define STEP_DEPTH (STEP_BYTES / (int)sizeof(storage_t))  // numbers
#define DEPTH_BYTES 128                                   // of depth: one stage of the pipeline
#define DEPTH (DEPTH_BYTES / (int)sizeof(storage_t))      // numbers

// An operand with its depth contiguous: rows of 128 bytes, the 8 pieces of each exchanged by the row's number, so that
// 8 threads that write a row, and the 8 rows of a matrix that ldmatrix reads, lie in all 32 banks.
struct DepthContiguous {
    __device__ static int offset(int row, int piece) { return row * DEPTH_BYTES + ((piece ^ (row & 7)) * PIECE_BYTES); }

    // Fragment a of 16 rows from `row` on (left) or fragments b of two times 8 (right), in `step` of the stage.
    __device__ static void load_left(unsigned (&a)[4], const char* operand, int row, int step) {
        const int lane = warp_lane();
        ldmatrix_x4(a[0], a[1], a[2], a[3], operand + offset(row + lane % 16, 2 * step + lane / 16));
    }
    __device__ static void load_right(unsigned (&first)[2], unsigned (&second)[2], const char* operand, int row, int step) {
        const int lane = warp_lane();
        ldmatrix_x4(first[0], first[1], second[0], second[1],
                    operand + offset(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    }
};

// An operand with its depth running down: WIDTH numbers of one depth are contiguous. bfloat16 is transposed by ldmatrix.
// tf32 is loaded number by number (ldmatrix would part its halves): the lanes of a warp read 4 depths of 8 numbers.
template <int WIDTH>
struct DepthDown {
    __device__ static int offset(int depth, int piece) {
        const int exchange = MULTIPLY == BF16 ? depth & 7 : (depth & 3) << 1;
        return depth * WIDTH * (int)sizeof(storage_t) + ((piece ^ exchange) * PIECE_BYTES);
    }

    __device__ static void load_left(unsigned (&a)[4], const char* operand, int column, int step) {
        const int lane = warp_lane();
        if constexpr (MULTIPLY == BF16) {
            ldmatrix_x4_trans(a[0], a[1], a[2], a[3],
                              operand + offset(STEP_DEPTH * step + lane / 16 * 8 + lane % 8, column / PIECE + lane / 8 % 2));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = number(operand, column + i % 2 * 8, step, i / 2);
        }
    }
    __device__ static void load_right(unsigned (&first)[2], unsigned (&second)[2], const char* operand, int column, int step) {
        const int lane = warp_lane();
        if constexpr (MULTIPLY == BF16) {
            ldmatrix_x4_trans(first[0], first[1], second[0], second[1],
                              operand + offset(STEP_DEPTH * step + lane % 16, column / PIECE + lane / 16));
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                first[i] = number(operand, column, step, i);
                second[i] = number(operand, column + 8, step, i);
            }
        }
    }

private:
    // Of the 8 columns from `column` on and the 4 depths of a half step, the number that this lane holds.
    __device__ static unsigned number(const char* operand, int column, int step, int half) {
        const int g = warp_lane() / 4, t = warp_lane() % 4;
        const int bytes = offset(STEP_DEPTH * step + 4 * half + t, (column + g) / PIECE) + g % PIECE * (int)sizeof(storage_t);
        return *(const unsigned*)(operand + bytes);
    }
};

// Adds to a warp's tile the product of a stage: `left` and `right` are its operands, in which the warp's part begins at
// `row` and `column`. The fragments of the next step are loaded while the tensor cores work on this one.
template <class Operands, int ROWS, int COLUMNS>
__device__ void add_stage(WarpTile<ROWS, COLUMNS>& tile, const char* left, const char* right, int row, int column) {
    typedef typename Operands::Left Left;
    typedef typename Operands::Right Right;
    constexpr int STEPS = DEPTH_BYTES / STEP_BYTES;
    typename WarpTile<ROWS, COLUMNS>::Step fragments[2];
    auto load = [&](int step) {
        auto& f = fragments[step % 2];
#pragma unroll
        for (int m = 0; m < ROWS / 16; ++m) Left::load_left(f.a[m], left, row + 16 * m, step);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) Right::load_right(f.b[n], f.b[n + 1], right, column + 8 * n, step);
    };
    load(0);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (step + 1 < STEPS) load(step + 1);
        tile.add_product(fragments[step % 2]);
    }
}
