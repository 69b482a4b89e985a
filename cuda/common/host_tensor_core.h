// How a tensor core adds, on the host device: what mma.cuh and wgmma.cuh have in common there.
//
// NVIDIA does not document it. Measurements (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// PeerJ Computer Science 7:e330, 2021; Khattak, Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv 2512.07004, 2025)
// found, of one instruction: the products are exact, with two bits before the point; all of them and the sum that comes in
// are shifted to the largest exponent among them, and what then lies below a fixed bit is cut off; they are added without
// loss, and the total is cut off to a float. Nothing is rounded to nearest: every instruction takes on average half a unit
// of the last bit off the absolute value of a sum, always towards zero, where roundings would partly cancel.
//
// Here as an H100 does it: 25 bits below the largest exponent, the whole depth of an instruction of 32 bytes in one
// addition. Other generations keep 23 (V100) or 24 (A100), and an A100 adds half the depth at a time, twice.
#pragma once

namespace host {

typedef float Row __attribute__((vector_size(32), aligned(4)));  // 8 columns: loops over them are not always vectorised
typedef int IntRow __attribute__((vector_size(32)));

constexpr int kBitsBelow = 25;  // the largest exponent
constexpr int kExponent = 0x7F800000, kFractionBits = 23, kBias = 127;

// The power of two below the absolute value.
inline Row power_of(Row value) { return (Row)((IntRow)value & kExponent); }

// 2^exponent, the exponent with its bias.
inline Row power_of_two(IntRow exponent) { return (Row)(exponent << kFractionBits); }

// `sum` plus the products a[k a_step] b[k b_step ... + 7], k below DEPTH, as one instruction. Below 2^-101 bits are lost
// that a tensor core keeps.
template <int DEPTH>
Row tensor_core_sum(Row sum, const float* a, int a_step, const float* b, int b_step) {
    typedef long long Bits __attribute__((vector_size(64)));
    typedef double Wide __attribute__((vector_size(64)));
    Row products[DEPTH], largest = power_of(sum), plain = sum;
    for (int k = 0; k < DEPTH; ++k) {
        const Row factor = Row{} + a[k * a_step], column = *reinterpret_cast<const Row*>(b + k * b_step);
        products[k] = factor * column;
        plain += products[k];
        const Row power = power_of(factor) * power_of(column);
        largest = power > largest ? power : largest;
    }
    IntRow exponent = (IntRow)largest >> kFractionBits;
    exponent = exponent > kBitsBelow + 1 ? exponent : IntRow{} + (kBitsBelow + 1);
    const Row scale = power_of_two(2 * kBias + kBitsBelow - exponent);
    Wide total = __builtin_convertvector(__builtin_convertvector(sum * scale, IntRow), Wide);
    for (int half = 0; half < DEPTH; half += 8) {  // eight terms below 2^27 fit an int
        IntRow terms = {};
        for (int k = half; k < half + 8; ++k) terms += __builtin_convertvector(products[k] * scale, IntRow);
        total += __builtin_convertvector(terms, Wide);
    }
    const Wide cut = (Wide)((Bits)total & ~0x1FFFFFFFll);  // to the 24 bits of a float
    const Row kept = __builtin_convertvector(cut, Row) * power_of_two(exponent - kBitsBelow);
    return plain - plain == 0 ? kept : plain;  // infinity and NaN as always
}

}  // namespace host
