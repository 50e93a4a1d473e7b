// ternary_sum: trits of all ranks to the bit planes of their exact sums.
#include "ternary.cuh"

namespace pydist::cuda {
namespace {

// The words of a lane to their places. kWords: the memory is aligned.
template <bool kWords>
PYDIST_DEVICE void store_planes(const Fields& words, const PlanePlaces& places,
                                unsigned char* sums) {
#pragma unroll
  for (int j = 0; j < kLaneBytes; ++j) {
    if (places.at[j] < 0 || places.beyond[j]) continue;
    if constexpr (kWords) {
      *reinterpret_cast<uint32_t*>(sums + places.at[j]) = words[j];
    } else {
      store_word_bytes(sums + places.at[j], words[j]);
    }
  }
}

// Up to 15 ranks. The four words of a lane are transposed twice, within their nibbles and between
// the lanes of a unit: then a lane holds four words of the planes.
PYDIST_DEVICE void sum_narrow(const TernarySource& a, bool even, const uint32_t* table,
                              const PlanePlaces& places, unsigned char* out, int64_t first,
                              int units, int lane, uint32_t* seen) {
#pragma unroll 1
  for (int step = 0; step < units; step += kStepUnits) {
    const int unit = step + lane / kLanesAUnit;
    Fields fields;
    sum_fields(a, even, table, first + unit, unit < units, lane, fields, seen);
    transpose_nibbles(fields);
    unsigned char* sums = out + (first + unit) * places.unit_bytes;
#pragma unroll
    for (int j = 0; j < kLaneBytes; ++j) fields[j] = transpose_bits<kNibble>(fields[j], lane);
    if (unit >= units) continue;
    if (aligned<4>(reinterpret_cast<int64_t>(out))) {
      store_planes<true>(fields, places, sums);
    } else {
      store_planes<false>(fields, places, sums);
    }
  }
}

// Any number: a lane's digits are elements lane, lane + 32, …, and a ballot is a word of a plane.
PYDIST_DEVICE void sum_wide(const TernarySource& a, unsigned char* planes, int64_t unit, int lane,
                            bool* bad) {
  const int words = sum_bits(a.ranks) * kPlaneWords;
  Sums sums;
  sum_unit(a, unit, lane, sums, bad);
  uint32_t mine = 0;  // of 32 words one a lane
#pragma unroll 1
  for (int first = 0, plane = 0; first < words; first += kPlaneWords, ++plane) {
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      const int word = first + i;
      const uint32_t bits = __ballot_sync(kAllLanes, ((sums[i] >> plane) & 1) != 0);
      if (lane == word % kWarpSize) mine = bits;
      if (word % kWarpSize == kWarpSize - 1 || word == words - 1) {
        const int begin = word - word % kWarpSize;
        if (begin + lane <= word) store_word(planes + 4 * (begin + lane), mine);
      }
    }
  }
}

__global__ void __launch_bounds__(kBlockThreads, 4)
    ternary_sum_kernel(Rows rows, TernarySource a, unsigned char* out, uint32_t* flags) {
  __shared__ uint32_t table[kBlockThreads];
  fill_table(table);
  const int lane = lane_id();
  const bool narrow = a.ranks <= kNarrowRanks;
  const bool even = aligned<4>(reinterpret_cast<int64_t>(a.data) | a.stride);
  const PlanePlaces places(a.ranks, lane);
  bool bad = false;
  for_units(rows, [&](const Row&, int64_t first, int64_t, int n) {
    const int units = (n + kUnit - 1) / kUnit;
    uint32_t seen = 0;
    if (narrow) {
      sum_narrow(a, even, table, places, out, first, units, lane, &seen);
    } else {
#pragma unroll 1
      for (int64_t unit = first; unit < first + units; ++unit) {
        sum_wide(a, out + unit * sum_unit_bytes(a.ranks), unit, lane, &bad);
      }
    }
    bad = bad || (seen & kMalformed) != 0;
  });
  raise_flags(flags, bad, kFlagMalformed);
}

}  // namespace

void ternary_sum(const Rows& rows, const TernarySource& from, unsigned char* out, uint32_t* flags,
                 void* stream) {
  launch_blocks("ternary_sum", ternary_sum_kernel, rows, stream, from, out, flags);
}

}  // namespace pydist::cuda
