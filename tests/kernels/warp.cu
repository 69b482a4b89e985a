// Kernels for the tests of warps: what every lane brings and takes away lies open in global memory.
#include "common/async_copy.cuh"
#include "common/mma.cuh"

extern "C" __global__ void shuffles(
    const float* x,   // (threads)
    float* received,  // (6, threads)
    int* votes,       // (3, threads)
    int threads, int amount, int width) {
    const int i = threadIdx.x;
    received[i] = __shfl_sync(0xFFFFFFFF, x[i], amount, width);
    received[threads + i] = __shfl_up_sync(0xFFFFFFFF, x[i], amount, width);
    received[2 * threads + i] = __shfl_down_sync(0xFFFFFFFF, x[i], amount, width);
    received[3 * threads + i] = __shfl_xor_sync(0xFFFFFFFF, x[i], amount, width);
    received[4 * threads + i] = (float)__shfl_sync(0xFFFFFFFF, (double)x[i], threadIdx.x + amount);
    // Two halves of a warp, each by itself.
    if (i & 16)
        received[5 * threads + i] = __shfl_xor_sync(0xFFFF0000, x[i], 1);
    else
        received[5 * threads + i] = __shfl_xor_sync(0x0000FFFF, x[i], 2);
    __syncwarp();
    votes[i] = (int)__ballot_sync(0xFFFFFFFF, x[i] > 0);
    votes[threads + i] = __any_sync(0xFFFFFFFF, x[i] > 1);
    votes[2 * threads + i] = __all_sync(0xFFFFFFFF, x[i] > -1);
}

// Lanes hand a value round through shared memory, each time to the next; only a warp's own threads wait for each other.
extern "C" __global__ void pass_round(int* out, int rounds) {
    SHARED_ARRAY(int, cells, [64]);
    const int warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    int value = threadIdx.x;
    for (int round = 0; round < rounds; ++round) {
        cells[threadIdx.x] = value;
        __syncwarp();
        value = cells[warp + (lane + 1) % 32];
        __syncwarp();
    }
    out[threadIdx.x] = value;
}

// `fragments` of b and d side by side, at most two.
template <bool BF16>
__device__ void multiply_open(const unsigned* a, const unsigned* b, float* d, int fragments) {
    float sums[2][4] = {};
    unsigned left[4], right[2][2] = {};
    for (int i = 0; i < 4; ++i) left[i] = a[4 * threadIdx.x + i];
    for (int n = 0; n < fragments; ++n) {
        for (int i = 0; i < 4; ++i) sums[n][i] = d[4 * (32 * n + threadIdx.x) + i];
        for (int i = 0; i < 2; ++i) right[n][i] = b[2 * (32 * n + threadIdx.x) + i];
    }
    if (BF16)
        mma_m16n8k16_bf16(sums, left, right);
    else
        mma_m16n8k8_tf32(sums, left, right);
    for (int n = 0; n < fragments; ++n)
        for (int i = 0; i < 4; ++i) d[4 * (32 * n + threadIdx.x) + i] = sums[n][i];
}

extern "C" __global__ void multiply_tf32(
    const unsigned* a,  // (32, 4)
    const unsigned* b,  // (fragments, 32, 2)
    float* d,           // (fragments, 32, 4)
    int fragments) {
    multiply_open<false>(a, b, d, fragments);
}

extern "C" __global__ void multiply_bf16(
    const unsigned* a,  // (32, 4)
    const unsigned* b,  // (fragments, 32, 2)
    float* d,           // (fragments, 32, 4)
    int fragments) {
    multiply_open<true>(a, b, d, fragments);
}

extern "C" __global__ void round_to_tf32(
    const float* x,     // (count)
    unsigned* rounded,  // (count)
    int count) {
    FOR_EACH_INDEX(i, count) rounded[i] = to_tf32(x[i]);
}

// rows[l] is the row, of 16 bytes, that lane l points at.
extern "C" __global__ void load_matrices(
    const unsigned* numbers,  // (rows, 4)
    const int* row_of,        // (32)
    unsigned* plain,          // (32, 4)
    unsigned* transposed,     // (32, 4)
    int rows) {
    SHARED_DYNAMIC(unsigned, memory);
    for (int i = threadIdx.x; i < 4 * rows; i += blockDim.x) memory[i] = numbers[i];
    __syncthreads();
    const unsigned* const row = memory + 4 * row_of[threadIdx.x];
    unsigned* const p = plain + 4 * threadIdx.x;
    unsigned* const t = transposed + 4 * threadIdx.x;
    ldmatrix_x4(p[0], p[1], p[2], p[3], row);
    ldmatrix_x4_trans(t[0], t[1], t[2], t[3], row);
}

// Two groups of copies; the first `waits` waits are carried out. Sizes: 16 bytes and, of them, `bytes` read.
extern "C" __global__ void copy_groups(
    const float* x,  // (2, threads, 4)
    float* y,        // (2, threads, 4)
    int threads, int bytes, int waits, int barrier) {
    SHARED_DYNAMIC(float, memory);
    float* const first = memory + 4 * threadIdx.x;
    float* const second = first + 4 * threads;
    cp_async_16(first, x + 4 * threadIdx.x, bytes);
    cp_async_commit();
    cp_async_16(second, x + 4 * (threads + threadIdx.x), bytes ? 16 : 0);
    cp_async_commit();
    if (waits > 0) cp_async_wait_group<1>();
    if (waits > 1) cp_async_wait_group<0>();
    if (barrier) __syncthreads();
    const int other = (threadIdx.x + 1) % threads;
    for (int i = 0; i < 4; ++i) {
        y[4 * threadIdx.x + i] = memory[4 * other + i];
        y[4 * (threads + threadIdx.x) + i] = memory[4 * (threads + other) + i];
    }
}

// ---------------------------------------------------------------------------------------------- wrong on purpose

extern "C" __global__ void lane_returns(float* x, int lane) {
    if (threadIdx.x == lane) return;
    x[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFF, x[threadIdx.x], 1);  // line of lane_returns
}

extern "C" __global__ void lane_at_barrier(float* x, int lane) {
    if (threadIdx.x == lane)
        __syncthreads();  // barrier of lane_at_barrier
    else
        __syncwarp();  // line of lane_at_barrier
}

extern "C" __global__ void two_lines(float* x, int lane) {
    float value = x[threadIdx.x];
    if (threadIdx.x < lane)
        value = __shfl_down_sync(0xFFFFFFFF, value, 1);  // upper line
    else
        value = __shfl_down_sync(0xFFFFFFFF, value, 1);  // lower line
    x[threadIdx.x] = value;
}

extern "C" __global__ void shuffle_masked(float* x, int mask, int source) {
    x[threadIdx.x] = __shfl_sync((unsigned)mask, x[threadIdx.x], source);  // line of shuffle_masked
}

extern "C" __global__ void misaligned(float* x, int copy, int row, int bytes) {
    SHARED_ARRAY(float, memory, [64]);
    unsigned r[4];
    memory[threadIdx.x] = 0;
    __syncthreads();
    cp_async_16(memory + copy, x, bytes);               // line of the copy
    ldmatrix_x4(r[0], r[1], r[2], r[3], memory + row);  // line of the load
}
