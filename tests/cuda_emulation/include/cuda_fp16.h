// __half: the conversions kernels use. Bits are right for every value; arithmetic goes through
// float32, rounded once, as cvt.rn does.
#pragma once

#include "emulation/arithmetic.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) {
  const unsigned sign = static_cast<unsigned>(h.bits & 0x8000u) << 16;
  const unsigned exponent = h.bits >> 10 & 0x1Fu;
  const unsigned mantissa = h.bits & 0x3FFu;
  if (exponent == 31) return __uint_as_float(mantissa ? 0x7FFFFFFFu : sign | 0x7F800000u);
  if (exponent == 0) {
    const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 16 & 0x8000u;
  const unsigned magnitude = bits & 0x7FFFFFFFu;
  unsigned half;
  if (magnitude > 0x7F800000u) {
    return {0x7FFF};  // the device's NaN
  } else if (magnitude >= 0x477FF000u) {
    half = 0x7C00;  // 65520 and above
  } else if (magnitude < 0x38800000u) {
    half = static_cast<unsigned>(std::nearbyint(__uint_as_float(magnitude) * 0x1p24f));
  } else {
    const unsigned shifted = magnitude - (112u << 23);
    half = (shifted + 0xFFFu + (shifted >> 13 & 1u)) >> 13;
  }
  return {static_cast<unsigned short>(sign | half)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline bool __hisnan(__half h) { return (h.bits & 0x7FFFu) > 0x7C00u; }
