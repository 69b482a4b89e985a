// Arithmetic on arrays of any shape, with NumPy's broadcasting: what a loss of one's own is made of.
//
//   arithmetic    y = a + b, a - b, a b, a / b or a^b        elementwise   y = exp x or log x
//   sum_*         y = sum of x (outer, times, inner) over its middle axis, in double
//   repeat        x = y, `times` times along that axis: the gradient of the sum, and broadcasting where the above cannot
//
// The gradients of the first two are arithmetic again (nn/autograd.py), sums along the axes where an array was repeated.
// An operand that is repeated along neighbouring axes is (outer, inner) where the result is (outer, times, inner).
//
// A sum's order is fixed: chunks of rows that depend on the shape alone, added up in order. Threads: of sum_partial a
// block for each (outer, group of up to THREADS columns) and chunk, neighbouring threads on neighbouring elements
// whatever `inner` is; of all others one element each, grid-stride.
#include "common/types.cuh"

#define THREADS 256

// Where an operand has element i of the result.
__device__ inline int64 source_of(int64 i, int64 times, int64 inner) {
    return times == 1 ? i : i / (times * inner) * inner + i % inner;
}

// `operation`: its place among BINARY in ops/elementwise/arithmetic.py
extern "C" __global__ void arithmetic(
    const storage_t* __restrict__ a,  // (count_a)
    const storage_t* __restrict__ b,  // (count_b)
    storage_t* __restrict__ y,        // (count)
    int64 count, int64 count_a, int64 inner_a, int64 count_b, int64 inner_b, int operation) {
    const int64 times_a = count / count_a, times_b = count / count_b;
    FOR_EACH_INDEX(i, count) {
        const storage_t p = a[source_of(i, times_a, inner_a)], q = b[source_of(i, times_b, inner_b)];
        y[i] = operation == 0   ? p + q
               : operation == 1 ? p - q
               : operation == 2 ? p * q
               : operation == 3 ? p / q
                                : pow(p, q);
    }
}

// `operation`: its place among UNARY
extern "C" __global__ void elementwise(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count, int operation) {
    FOR_EACH_INDEX(i, count) y[i] = operation == 0 ? exp(x[i]) : log(x[i]);
}

template <class T>
__device__ void sum_in_order(const T* x, storage_t* y, int64 outer, int64 times, int64 inner) {
    FOR_EACH_INDEX(i, outer * inner) {
        const T* const first = x + i / inner * times * inner + i % inner;
        double sum = 0;
        for (int64 k = 0; k < times; ++k) sum += first[k * inner];
        y[i] = (storage_t)sum;
    }
}

// For short sums.
extern "C" __global__ void sum_few(
    const storage_t* __restrict__ x,  // (outer, times, inner)
    storage_t* __restrict__ y,        // (outer, inner)
    int64 outer, int64 times, int64 inner) {
    sum_in_order(x, y, outer, times, inner);
}

// Launch: grid (outer * ((inner + THREADS - 1) / THREADS), chunks), block THREADS
extern "C" __global__ void sum_partial(
    const storage_t* __restrict__ x,  // (outer, times, inner)
    double* __restrict__ partials,    // (outer, chunks, inner)
    int64 outer, int64 times, int64 inner, int64 chunks, int64 rows_per_chunk) {
    SHARED_ARRAY(double, lanes, [THREADS]);
    const int64 groups = (inner + THREADS - 1) / THREADS, o = blockIdx.x / groups;
    const int width = inner < THREADS ? (int)inner : THREADS, rows_at_once = THREADS / width;
    const int row = threadIdx.x / width;
    const int64 column = blockIdx.x % groups * THREADS + threadIdx.x % width;
    const bool counts = row < rows_at_once && column < inner;
    const int64 first = blockIdx.y * rows_per_chunk, end = min(first + rows_per_chunk, times);
    double own = 0;
    if (counts)
        for (int64 k = first + row; k < end; k += rows_at_once) own += x[(o * times + k) * inner + column];
    lanes[threadIdx.x] = own;
    __syncthreads();
    if (row > 0 || !counts) return;
    double sum = 0;
    for (int k = 0; k < rows_at_once; ++k) sum += lanes[k * width + threadIdx.x];
    partials[(o * chunks + blockIdx.y) * inner + column] = sum;
}

extern "C" __global__ void sum_merge(
    const double* __restrict__ partials,  // (outer, chunks, inner)
    storage_t* __restrict__ y,            // (outer, inner)
    int64 outer, int64 chunks, int64 inner) {
    sum_in_order(partials, y, outer, chunks, inner);
}

extern "C" __global__ void repeat(
    const storage_t* __restrict__ dy,  // (outer, inner)
    storage_t* __restrict__ dx,        // (outer, times, inner)
    int64 outer, int64 times, int64 inner) {
    FOR_EACH_INDEX(i, outer * times * inner) dx[i] = dy[source_of(i, times, inner)];
}
