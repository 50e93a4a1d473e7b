// Sums of floats in the order of a CUDA warp of 32 lanes, and the largest magnitude.
#pragma once

#include "simd.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kWarpLanes = 32;  // sums go in the order of a CUDA warp
constexpr int kWarpVecs = kWarpLanes / kLanes;

// Calls visit(v, k) for the vectors of x[0, n): elements of lanes k * kLanes … of a row of 32. What
// is missing in the last row is zero.
template <typename Visit>
PYDIST_INLINE void for_rows(const float* x, int n, const Visit& visit) {
  const int full = n / kWarpLanes * kWarpLanes;
  for (int i = 0; i < full; i += kWarpLanes) {
    walks_word(x + i);
    for (int k = 0; k < kWarpVecs; ++k) visit(load(x + i + k * kLanes), k);
  }
  if (full < n) {
    float tail[kWarpLanes] = {};
    std::memcpy(tail, x + full, (n - full) * sizeof(float));
    for (int k = 0; k < kWarpVecs; ++k) visit(load(tail + k * kLanes), k);
  }
}

// The bits of the largest magnitude, or of something not finite.
PYDIST_INLINE uint32_t largest_magnitude(const float* x, int n) {
  Vec top[kWarpVecs];
  for (Vec& t : top) t = set1(0.0f);
  for_rows(x, n, [&](Vec v, int k) { top[k] = max_bits(top[k], abs(v)); });
  for (int k = 1; k < kWarpVecs; ++k) top[0] = max_bits(top[0], top[k]);
  return top_bits(top[0]);
}

PYDIST_INLINE float add_lanes(const Vec (&sum)[kWarpVecs]) {
  float lanes[kWarpLanes];
  for (int k = 0; k < kWarpVecs; ++k) store(lanes + k * kLanes, sum[k]);
  for (int distance = kWarpLanes / 2; distance; distance /= 2) {
    for (int l = 0; l < distance; ++l) lanes[l] = lanes[l] + lanes[l + distance];
  }
  return lanes[0];
}

}  // namespace pydist::cpu::PYDIST_ISA
