// ternary_segments and ternary_scale: the scaler of a layer, in two steps. Segments of 4,096
// elements are summed on their own, then the segments' sums, in the same order of lanes.
#include "../simd/convert.h"
#include "../simd/warp_order.h"
#include "../table.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

SegmentSum segment_sum(const float* x, int n) {
  const uint32_t largest = largest_magnitude(x, n);
  if (largest >= kInfBits) return {largest, 0.0f};
  const Vec factor = set1(power_of_two(-sum_exponent(largest)));
  Vec sum[kWarpVecs];
  for (Vec& s : sum) s = set1(0.0f);
  for_rows(x, n, [&](Vec v, int k) {
    const Vec y = mul(v, factor);
    sum[k] = add(sum[k], mul(y, y));
  });
  return {largest, add_lanes(sum)};
}

}  // namespace

template <typename T>
void ternary_segments(const void* x, int64_t n, SegmentSum* sums) {
  alignas(64) float room[kSumSegment];
  for (int64_t i = 0; i < n; i += kSumSegment) {
    const int count = static_cast<int>(n - i < kSumSegment ? n - i : kSumSegment);
    sums[i / kSumSegment] = segment_sum(widened(static_cast<const T*>(x) + i, count, room), count);
  }
}

template void ternary_segments<float>(const void*, int64_t, SegmentSum*);
template void ternary_segments<Half>(const void*, int64_t, SegmentSum*);
template void ternary_segments<BFloat>(const void*, int64_t, SegmentSum*);

uint32_t ternary_scale(const Row& row, const TernaryScaleArgs& a) {
  const SegmentSum* sums = a.scratch + row.word;
  const int64_t count = (row.n + kSumSegment - 1) / kSumSegment;
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = sums[i].largest > largest ? sums[i].largest : largest;
  }
  float scaler = bits_float(kNanBits);
  if (largest < kInfBits) {
    const int top = sum_exponent(largest);
    float lanes[kWarpLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      lanes[i % kWarpLanes] += rescaled_squares(sums[i].squares, sums[i].largest, top);
    }
    for (int distance = kWarpLanes / 2; distance; distance /= 2) {
      for (int l = 0; l < distance; ++l) lanes[l] = lanes[l] + lanes[l + distance];
    }
    const float mean = row.n ? lanes[0] / static_cast<float>(row.n) : 0.0f;
    scaler = scaler_of(a.clip, largest, __builtin_sqrtf(mean), top);
  }
  std::memcpy(reinterpret_cast<void*>(row.momentum), &scaler, sizeof(scaler));
  return largest < kInfBits ? 0u : kFlagNonFinite;
}

}  // namespace pydist::cpu::PYDIST_ISA
