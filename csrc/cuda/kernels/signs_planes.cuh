// Reading a vote back from bit planes; shared by lion_apply and unpack_votes.
#pragma once

#include "../nibbles.cuh"
#include "../rows.cuh"

namespace pydist::cuda {

// What the planes of a vote hold. Counts come in sizes, so that planes live in numbered registers.
enum class PlaneKind { kSign, kSignNonZero, kCounts4, kCounts8, kCounts16 };

constexpr int plane_slots(PlaneKind kind) {
  switch (kind) {
    case PlaneKind::kSign:
      return 1;
    case PlaneKind::kSignNonZero:
      return 2;
    case PlaneKind::kCounts4:
      return 4;
    case PlaneKind::kCounts8:
      return 8;
    case PlaneKind::kCounts16:
      return 16;
  }
  return 0;
}

template <PlaneKind kKind>
constexpr int kSlots = plane_slots(kKind);

inline PlaneKind plane_kind(int count, int64_t ranks) {
  if (!ranks) return count == 2 ? PlaneKind::kSignNonZero : PlaneKind::kSign;
  if (count <= 4) return PlaneKind::kCounts4;
  return count <= 8 ? PlaneKind::kCounts8 : PlaneKind::kCounts16;
}

template <PlaneKind kKind>
constexpr bool kCounts = kKind != PlaneKind::kSign && kKind != PlaneKind::kSignNonZero;

// The votes of a lane's elements: element j of step k is number kWidth * k + j. Bit i of a plane
// belongs to element i; of counts, planes are turned into nibbles.
template <PlaneKind kKind>
struct LaneVotes {
  uint32_t planes[kSlots<kKind>];

  // Four bits and more of the count of element first + offset, the lowest in bit 0, from plane
  // 4 * group on. `first` is a multiple of four, `offset` a constant: words are numbered registers.
  PYDIST_DEVICE_MEMBER uint32_t nibble(int group, int first, int offset) const {
    const int word = offset % kNibble;
    return planes[kNibble * group + word] >> (first + offset - word);
  }

  // The sum of the ranks' votes of that element: ±1 (or 0) for a majority, 2 * count - ranks for
  // counts (exact: below 2^24).
  PYDIST_DEVICE_MEMBER float value(int first, int offset, int ranks) const {
    if constexpr (kCounts<kKind>) {
      uint32_t count = 0;
#pragma unroll
      for (int g = 0; g < kSlots<kKind> / kNibble; ++g) {
        count |= (nibble(g, first, offset) & 15u) << (kNibble * g);
      }
      return static_cast<float>(2 * static_cast<int>(count) - ranks);
    } else {
      const int bit = first + offset;
      const float sign = (planes[0] >> bit) & 1u ? 1.0f : -1.0f;
      if constexpr (kKind == PlaneKind::kSign) return sign;
      return (planes[kSlots<kKind> - 1] >> bit) & 1u ? sign : 0.0f;
    }
  }
};

// Reads a chunk of n elements at word `word` of every plane: one word a lane, then transposed.
// Planes above `count` are zero.
template <PlaneKind kKind, int kWidth>
PYDIST_DEVICE LaneVotes<kKind> load_votes(const unsigned char* planes, int64_t plane_bytes,
                                          int count, int64_t word, int n, int lane) {
  LaneVotes<kKind> votes;
  const int own = word_of_lane<kWidth>(lane);
  const bool there = own * kWordBits < n;
  const unsigned char* at = planes + 4 * (word + own);
  if (aligned<4>(reinterpret_cast<int64_t>(planes) | plane_bytes)) {  // one branch for all loads
#pragma unroll
    for (int k = 0; k < kSlots<kKind>; ++k) {
      const auto* p = reinterpret_cast<const uint32_t*>(at + k * plane_bytes);
      votes.planes[k] = there && k < count ? *p : 0u;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSlots<kKind>; ++k) {
      votes.planes[k] = there && k < count ? load_word_bytes(at + k * plane_bytes) : 0u;
    }
  }
#pragma unroll
  for (int k = 0; k < kSlots<kKind>; ++k) {
    // `count` is the same everywhere: no lane leaves a shuffle that others enter.
    if (k < count) votes.planes[k] = transpose_bits<kWidth>(votes.planes[k], lane);
  }
  if constexpr (kCounts<kKind>) {
#pragma unroll
    for (int k = 0; k < kSlots<kKind>; k += kNibble) transpose_nibbles(votes.planes + k);
  }
  return votes;
}

}  // namespace pydist::cuda
