// TernGrad (arXiv 1705.07878): trits with a scaler per parameter, and their integer sums. Every
// operation is rounded on its own; docs/wire_format.md says what the bytes mean,
// pydist/reference/ternary.py executes it.
//
// A unit is 160 elements in 32 bytes: element i is base-3 digit i / 32 of byte i % 32. A row's
// `word` counts units, `momentum` is where this rank's own scaler is (values are clipped to it),
// `momentum_out` where the scaler of all ranks is; both are float32 and need not be aligned.
#pragma once

#include "blocks.h"

namespace pydist {

constexpr int kUnit = 160;  // elements
constexpr int kUnitBytes = 32;
constexpr int kDigits = 5;  // of a byte: 3^5 = 243
constexpr int kLargestByte = 242;
constexpr int kPlaneWords = kUnit / kWordBits;  // of a bit plane of a unit's sums

// A layer is summed in segments of so many elements, and the segments' sums in the same way.
constexpr int kSumSegment = 4096;

// Below 2^-110 a scaler counts as zero: 65536 / scaler would overflow.
constexpr uint32_t kSmallestScalerBits = (127u - 110u) << 23;

// What a segment of a layer leaves behind.
struct SegmentSum {
  uint32_t largest;  // bits of the largest magnitude, or of something not finite
  float squares;     // sum of (x / 2^e)^2, where e is the exponent of the largest
};

struct TernaryScaleArgs {
  float clip;           // standard deviations; 0: no clipping
  SegmentSum* scratch;  // one for each segment of every row, which `word` counts
};

struct TernaryPackArgs {
  unsigned char* payload;
  int64_t bytes;              // where it ends; a short unit before that is padded with zeros
  uint32_t seed, key1, step;  // the place of the random draws
  const int64_t* step_at;     // CUDA: where the step is in device memory; null: `step` it is
};

// What kernels read: payloads of all ranks, or the sums of as many.
struct TernarySource {
  const unsigned char* data;
  int64_t bytes;   // of one payload, or of the sums
  int64_t stride;  // bytes from one rank's payload to the next
  int64_t ranks;
  float divisor;  // sums are divided by this: 1 for a sum, ranks for a mean
};

// The same for a row's own message, whose bytes may lie anywhere.
PYDIST_INLINE TernaryPackArgs in_message(TernaryPackArgs a, const Row& row) {
  a.payload += row.message;
  return a;
}
PYDIST_INLINE TernarySource in_message(TernarySource a, const Row& row) {
  a.data += row.message;
  return a;
}

// ------------------------------------------------------------ scalers

// The sum of squares of a segment in units of 2^(2 * top), which is no finer than its own.
PYDIST_INLINE float rescaled_squares(float squares, uint32_t largest, int top) {
  const int shift = sum_exponent(largest) - top;  // 0 or below
  const float factor = power_of_two(shift < -126 ? -126 : shift);
  const float once = squares * factor;
  return once * factor;
}

// The scaler of a layer of n elements whose squares add up to `squares` in units of 2^(2 * top).
PYDIST_INLINE float scaler_of(float clip, uint32_t largest, float root, int top) {
  uint32_t bits = largest;
  if (clip > 0.0f) {
    const float wide = clip * root;
    const uint32_t limit = float_bits(wide * power_of_two(top));
    bits = limit < bits ? limit : bits;
  }
  return bits < kSmallestScalerBits ? 0.0f : bits_float(bits);
}

// What magnitudes are held to, and multiplied by before they are compared with a draw.
struct TritScale {
  float limit, factor;
};
PYDIST_INLINE TritScale trit_scale(float own, float shared) {
  const bool usable = shared >= bits_float(kSmallestScalerBits);  // not of NaN
  return {own > 0.0f ? own : 0.0f, usable ? 65536.0f / shared : 0.0f};
}

// ------------------------------------------------------------ sums

// Bits of a sum of `ranks` trits in two's complement: ceil(log2(2 * ranks + 1)).
PYDIST_INLINE int sum_bits(int64_t ranks) { return planes_for(ranks) + 1; }
PYDIST_INLINE int64_t sum_unit_bytes(int64_t ranks) {
  return static_cast<int64_t>(sum_bits(ranks)) * kPlaneWords * 4;
}

PYDIST_INLINE float trit_value(float scaler, int32_t sum, float divisor) {
  const float share = static_cast<float>(sum) / divisor;
  return scaler * share;
}

}  // namespace pydist
