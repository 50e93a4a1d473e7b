// Formats that share a scale among the elements of a block: what kernels are told of them, and the
// arithmetic of one scale, one code, one value. Every operation is rounded on its own;
// pydist/reference/blocks.py executes the same.
#pragma once

#include "philox.h"
#include "rounding.h"

namespace pydist {

enum class Scheme : int { kSign = 0, kLevels = 1, kE4M3 = 2, kE5M2 = 3 };
enum class Norm : int { kMax = 0, kL1 = 1, kL2 = 2 };

// A format. Levels are the integers -top ... top; level q stands for q / top of the scale.
struct BlockFormat {
  Scheme scheme;
  int bits;   // a code: 1 for signs, 2 ... 8 for levels, 8 for floats
  int block;  // elements, a multiple of 32
  Norm norm;
  bool stochastic;
  float top;           // 2^(bits - 1) - 1
  float inverse_high;  // 1 / top in 17 bits, so that the product with a level is exact,
  float inverse_low;   // and the rest
};

// Where codes and scales are written. Block k is row.word + its place in the row; codes end at
// code_bytes (a short block before that is padded with zeros to its full length).
struct EncodeArgs {
  BlockFormat format;
  unsigned char* codes;
  unsigned char* scales;
  int64_t code_bytes;
  uint32_t zero_bit;          // what zero encodes as; for signs
  uint32_t seed, key1, step;  // the place of the random draws
  const int64_t* step_at;     // CUDA: where the step is in device memory; null: `step` it is
};

// Where they are read: those of rank r are r * stride bytes further on.
struct DecodeArgs {
  BlockFormat format;
  const unsigned char* codes;
  const unsigned char* scales;
  int64_t stride;
  int64_t ranks;
  float divisor;  // sums are divided by this: 1 for a sum, ranks for a mean
};

// The same for a row's own message, whose bytes may lie anywhere.
PYDIST_INLINE EncodeArgs in_message(EncodeArgs a, const Row& row) {
  a.codes += row.message, a.scales += row.message;
  return a;
}
PYDIST_INLINE DecodeArgs in_message(DecodeArgs a, const Row& row) {
  a.codes += row.message, a.scales += row.message;
  return a;
}

constexpr int kMaxBlock = 65536;
constexpr uint32_t kSmallestNormBits = 0x03800000u;  // 2^-120: below it, top / norm would overflow
constexpr uint32_t kLargestBits = 0x7F7FFFFFu;       // the largest finite float32

PYDIST_INLINE int64_t block_bytes(const BlockFormat& f) {
  return static_cast<int64_t>(f.block) * f.bits / 8;
}
PYDIST_INLINE int64_t code_bytes(const BlockFormat& f, int64_t n) {
  return words_for(n * f.bits) * 4;
}

// ------------------------------------------------------------ scales

PYDIST_INLINE float power_of_two(int exponent) {  // of normal numbers: -126 ... 127
  return bits_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// floor(log2) of a number given by its bits (subnormals have -127), held to low ... high.
PYDIST_INLINE int exponent_of(uint32_t magnitude, int low, int high) {
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  return exponent < low ? low : exponent > high ? high : exponent;
}

// The exponent that values are divided by before they are summed, so that no square overflows.
PYDIST_INLINE int sum_exponent(uint32_t largest) { return exponent_of(largest, -126, 126); }

// The largest exponent of an 8-bit float, and its largest value.
PYDIST_INLINE int float8_exponent(Scheme scheme) { return scheme == Scheme::kE4M3 ? 8 : 15; }
PYDIST_INLINE float float8_largest(Scheme scheme) {
  return scheme == Scheme::kE4M3 ? 448.0f : 57344.0f;
}
PYDIST_INLINE int float8_scale_exponent(Scheme scheme, uint32_t largest) {
  const int exponent = exponent_of(largest, -127, 127) - float8_exponent(scheme);
  return exponent < -126 ? -126 : exponent;
}

// A norm as it is stored: one that overflowed is the largest number, a tiny one of levels is zero.
PYDIST_INLINE float stored_norm(const BlockFormat& f, float norm) {
  const uint32_t bits = float_bits(norm);
  if (f.scheme == Scheme::kLevels && bits < kSmallestNormBits) return 0.0f;
  return bits > kLargestBits ? bits_float(kLargestBits) : norm;
}

// What levels are multiplied by before they are rounded; 0 for a block of zeros.
PYDIST_INLINE float level_factor(const BlockFormat& f, float scale) {
  return scale > 0.0f ? f.top / scale : 0.0f;
}

// ------------------------------------------------------------ levels

// Adding it rounds a float of magnitude below 2^22 to an integer, to nearest even; the integer is
// then in the low bits.
constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23

// q / top, correctly rounded: the first product is exact, the second far below half a unit.
PYDIST_INLINE float level_value(const BlockFormat& f, float q) {
  const float high = q * f.inverse_high;
  const float low = q * f.inverse_low;
  return high + low;
}

// ------------------------------------------------------------ 8-bit floats

// The code of the nearest 8-bit float of kMantissa bits, even in ties; |x| is at most the largest.
template <int kMantissa, int kBias>
PYDIST_INLINE uint32_t float8_code_of(float x) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - kBias) << 23;
  // One unit of the subnormal numbers is the last bit of this power of two.
  constexpr uint32_t kUnit = static_cast<uint32_t>(127 + 23 + 1 - kBias - kMantissa) << 23;
  const uint32_t u = float_bits(x);
  const uint32_t a = u & kAbsMask;
  const uint32_t rounded = a + (1u << (kShift - 1)) - 1u + ((a >> kShift) & 1u);
  const uint32_t normal = (rounded - (static_cast<uint32_t>(127 - kBias) << 23)) >> kShift;
  const uint32_t subnormal = float_bits(bits_float(a) + bits_float(kUnit)) - kUnit;
  return (a < kSmallestNormal ? subnormal : normal) | ((u >> 24) & 0x80u);
}

template <int kMantissa, int kBias>
PYDIST_INLINE float float8_value_of(uint32_t code) {
  constexpr int kShift = 23 - kMantissa;
  const uint32_t a = code & 0x7Fu;
  const uint32_t normal = (a << kShift) + (static_cast<uint32_t>(127 - kBias) << 23);
  const float unit = bits_float(static_cast<uint32_t>(127 + 1 - kBias - kMantissa) << 23);
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(a)) * unit);
  uint32_t bits = a < (1u << kMantissa) ? subnormal : normal;
  if (kMantissa == 3) {  // e4m3: one NaN, no infinity
    bits = a == 0x7Fu ? kNanBits : bits;
  } else {
    bits = a > 0x7Cu ? kNanBits : a == 0x7Cu ? kInfBits : bits;
  }
  return bits_float(bits | (code & 0x80u) << 24);
}

PYDIST_INLINE uint32_t float8_code(Scheme scheme, float x) {
  return scheme == Scheme::kE4M3 ? float8_code_of<3, 7>(x) : float8_code_of<2, 15>(x);
}
PYDIST_INLINE float float8_value(Scheme scheme, uint32_t code) {
  return scheme == Scheme::kE4M3 ? float8_value_of<3, 7>(code) : float8_value_of<2, 15>(code);
}

}  // namespace pydist
