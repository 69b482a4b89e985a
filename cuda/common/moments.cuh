// Mean and variance of numbers that several threads, blocks or chunks share: (count, mean, M2), M2 the sum of squared
// distances from the mean. Two of them merge without cancellation (Chan, Golub, LeVeque 1983, equations 2.1):
//
//   delta = mean_b - mean_a    mean = mean_a + delta count_b / count    M2 = M2_a + M2_b + delta^2 count_a count_b / count
//
// Never E[x^2] - E[x]^2: of a mean of 1000 and a deviation of 1, float32 would leave one digit.
#pragma once
#include "in_flight.cuh"

struct Moments {
    double count, mean, m2;
    __device__ void merge(const Moments& other) {
        if (other.count == 0) return;
        const double total = count + other.count, delta = other.mean - mean;
        mean += delta * (other.count / total);
        m2 += other.m2 + delta * delta * (count * other.count / total);
        count = total;
    }
};

// Of rows first, first + step, ... < end of one channel of x (rows, c): sums of distances from the first of them.
__device__ inline Moments moments_of(const storage_t* x, int64 first, int64 end, int step, int channel, int c) {
    if (first >= end) return {0, 0, 0};
    const double pivot = x[first * c + channel];
    double count = 0, sum = 0, squares = 0;
    for_each_in_flight<8>(
        first, end, step, [&](int64 row) { return load_here(x + row * c + channel); },
        [&](int64, storage_t value) {
            const double distance = value - pivot;
            count += 1;
            sum += distance;
            squares += distance * distance;
        });
    return {count, pivot + sum / count, squares - sum * (sum / count)};
}
