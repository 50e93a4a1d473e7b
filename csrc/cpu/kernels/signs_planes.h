// Reading a vote back from bit planes; shared by lion_apply and unpack_votes.
#pragma once

#include "../simd/simd.h"

namespace pydist::cpu::PYDIST_ISA {

// What the planes of a vote hold.
enum class PlaneKind { kSign, kSignNonZero, kCounts };

// The sum of the ranks' votes of kLanes elements: ±1 (or 0) for a majority, 2 * count - ranks for
// counts (exact: below 2^24). `words` are the planes' words, `j` the first element's place in them.
template <PlaneKind kKind>
PYDIST_INLINE Vec vote_value(const uint32_t* words, int count, float ranks, int j) {
  if (kKind == PlaneKind::kCounts) {
    Vec sum = set1(-ranks);
    for (int k = 0; k < count; ++k) {
      const Mask bit = mask_from((words[k] >> j) & kLaneMask);
      sum = add(sum, select(bit, set1(static_cast<float>(2 << k)), set1(0.0f)));
    }
    return sum;
  }
  const Mask positive = mask_from((words[0] >> j) & kLaneMask);
  const Vec sign = select(positive, set1(1.0f), set1(-1.0f));
  if (kKind == PlaneKind::kSign) return sign;
  return select(mask_from((words[1] >> j) & kLaneMask), sign, set1(0.0f));
}

PYDIST_INLINE void load_planes(const unsigned char* planes, int64_t plane_bytes, int count,
                               int64_t w, uint32_t* words) {
  for (int k = 0; k < count; ++k) words[k] = load_word(planes + k * plane_bytes + 4 * w);
}

PYDIST_INLINE PlaneKind plane_kind(int count, int64_t ranks) {
  if (ranks) return PlaneKind::kCounts;
  return count == 2 ? PlaneKind::kSignNonZero : PlaneKind::kSign;
}

}  // namespace pydist::cpu::PYDIST_ISA
