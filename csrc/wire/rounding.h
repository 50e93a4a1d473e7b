// float16 and bfloat16 without hardware: exact widening, round-to-nearest-even narrowing.
//
// Every NaN is stored as the one canonical quiet NaN of its type. Backends propagate NaN payloads
// differently (x86 keeps one operand's, CUDA makes its own), and replicas must stay
// bit-identical.
#pragma once

#include "layout.h"

namespace pydist {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

constexpr uint32_t kAbsMask = 0x7FFFFFFFu;
constexpr uint32_t kInfBits = 0x7F800000u;
constexpr uint32_t kNanBits = 0x7FC00000u;

PYDIST_INLINE uint32_t float_bits(float x) {
  union {
    float f;
    uint32_t u;
  } v;
  v.f = x;
  return v.u;
}

PYDIST_INLINE float bits_float(uint32_t u) {
  union {
    float f;
    uint32_t u;
  } v;
  v.u = u;
  return v.f;
}

PYDIST_INLINE float to_float(float x) { return x; }

PYDIST_INLINE float to_float(BFloat x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

PYDIST_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1Fu;
  const uint32_t mantissa = x.bits & 0x3FFu;
  if (exponent == 0x1Fu) return bits_float(sign | kInfBits | (mantissa << 13));
  if (exponent) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  // Subnormal: mantissa * 2^-24, exact in float32.
  return bits_float(float_bits(static_cast<float>(mantissa) * 5.9604644775390625e-8f) | sign);
}

PYDIST_INLINE void from_float(float x, float* out) {
  *out = (float_bits(x) & kAbsMask) > kInfBits ? bits_float(kNanBits) : x;
}

PYDIST_INLINE void from_float(float x, BFloat* out) {
  const uint32_t u = float_bits(x);
  if ((u & kAbsMask) > kInfBits) {
    out->bits = 0x7FC0u;
  } else {
    out->bits = static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  }
}

PYDIST_INLINE void from_float(float x, Half* out) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & kAbsMask;
  if (a > kInfBits) {
    out->bits = 0x7E00u;
  } else if (a >= 0x477FF000u) {  // 65520 and above round to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7C00u);
  } else if (a >= 0x38800000u) {  // normal in float16
    out->bits = static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13));
  } else if (a <= 0x33000000u) {  // 2^-25 and below round to zero (the tie goes to even)
    out->bits = static_cast<uint16_t>(sign);
  } else {  // subnormal in float16: shift the full significand, round to nearest even
    const uint32_t shift = 126u - (a >> 23);
    const uint32_t significand = (a & 0x7FFFFFu) | 0x800000u;
    const uint32_t kept = significand >> shift;
    const uint32_t rest = significand & ((1u << shift) - 1u);
    const uint32_t half = 1u << (shift - 1);
    const uint32_t up = (rest > half || (rest == half && (kept & 1u))) ? 1u : 0u;
    out->bits = static_cast<uint16_t>(sign | (kept + up));
  }
}

// A float32 whose absolute bits are below this stays finite when stored as T.
template <typename T>
struct FiniteLimit;
template <>
struct FiniteLimit<float> {
  static constexpr uint32_t value = 0x7F800000u;
};
template <>
struct FiniteLimit<Half> {
  static constexpr uint32_t value = 0x477FF000u;  // 65520, the tie above the largest float16
};
template <>
struct FiniteLimit<BFloat> {
  static constexpr uint32_t value = 0x7F7F8000u;  // the tie above the largest bfloat16 is infinity
};

}  // namespace pydist
