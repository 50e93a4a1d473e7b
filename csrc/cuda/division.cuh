// Many numbers divided by one, to the bits that IEEE division has, without its thirty instructions.
//
// A divisor d is a count of ranks, 1 ... 65535. With r = 1 / d rounded, q = x * r is within two
// units in the last place of x / d. As d has 16 bits, the remainder q * d - x is a number that
// float32 holds, and q - (q * d - x) * r, rounded once by the fused operation, is computed as if
// from x / d with an error below 2^-22 units. A quotient of a 24-bit number and a 16-bit one that
// is no power of two lies at least 2^-17 units away from the middle between two floats, so the
// rounding is that of x / d. This holds while q is a normal number: from |x| = 2^-110 on.
// The remainder is taken with this sign so that a zero keeps its own: -0 * r = -0.
#pragma once

#include "common.cuh"

namespace pydist::cuda {

struct Divisor {
  float value, reciprocal;

  PYDIST_DEVICE_MEMBER explicit Divisor(float d) : value(d), reciprocal(1.0f / d) {}

  // Of two: the reciprocal is exact, and so one product is the quotient, rounded once.
  PYDIST_DEVICE_MEMBER bool power() const { return (float_bits(value) & 0x7FFFFFu) == 0; }
};

constexpr uint32_t kSmallestDividend = 17u << 23;  // 2^-110

// x / d for x = 0, a NaN, or 2^-110 <= |x| < infinity: any count, for one.
PYDIST_DEVICE float divided(float x, const Divisor& d) {
  const float q = x * d.reciprocal;
  return __fmaf_rn(__fmaf_rn(q, d.value, -x), -d.reciprocal, q);
}

// Whether divided() takes all of v.
template <int kCount>
PYDIST_DEVICE bool dividable(const float (&v)[kCount]) {
  float most = 0.0f;
  uint32_t least = 0xFFFFFFFFu;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    most = fmaxf(most, fabsf(v[j]));                    // of NaN and a number, the number
    const uint32_t below = float_bits(v[j]) * 2u - 2u;  // without the sign; of zero, large
    least = below < least ? below : least;
  }
  return float_bits(most) < kInfBits && least >= kSmallestDividend * 2u - 2u;
}

// v[j] = v[j] / d, whatever they are.
template <int kCount>
PYDIST_DEVICE void divide(float (&v)[kCount], const Divisor& d) {
  if (d.power()) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = v[j] * d.reciprocal;
  } else if (dividable(v)) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = divided(v[j], d);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = v[j] / d.value;  // unrolled: v stays in registers
  }
}

}  // namespace pydist::cuda
