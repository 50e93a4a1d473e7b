// Reading a vote back from bit planes; shared by lion_apply and unpack_votes.
#pragma once

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

// The bits of a lane's elements: bit kWidth * k + j of a plane belongs to element j of step k.
template <PlaneKind kKind>
struct LaneVotes {
  uint32_t planes[kSlots<kKind>];

  // The sum of the ranks' votes of one element: ±1 (or 0) for a majority, 2 * count - ranks for
  // counts (exact: below 2^24).
  __device__ __forceinline__ float value(int bit, float ranks) const {
    if constexpr (kKind == PlaneKind::kSign) {
      return (planes[0] >> bit) & 1u ? 1.0f : -1.0f;
    } else if constexpr (kKind == PlaneKind::kSignNonZero) {
      const float sign = (planes[0] >> bit) & 1u ? 1.0f : -1.0f;
      return (planes[1] >> bit) & 1u ? sign : 0.0f;
    } else {
      float sum = -ranks;
#pragma unroll
      for (int k = 0; k < kSlots<kKind>; ++k) {
        sum += (planes[k] >> bit) & 1u ? static_cast<float>(2 << k) : 0.0f;
      }
      return sum;
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
  const unsigned char* at = planes + 4 * (word + own);
#pragma unroll
  for (int k = 0; k < kSlots<kKind>; ++k) {
    const bool present = k < count && own * kWordBits < n;
    votes.planes[k] = present ? load_word(at + k * plane_bytes) : 0u;
  }
#pragma unroll
  for (int k = 0; k < kSlots<kKind>; ++k) {
    // `count` is the same everywhere: no lane leaves a shuffle that others enter.
    if (k < count) votes.planes[k] = transpose_bits<kWidth>(votes.planes[k], lane);
  }
  return votes;
}

}  // namespace pydist::cuda
