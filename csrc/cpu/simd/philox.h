// Philox on vectors: kWideLanes groups side by side. The upper halves of the 64-bit lanes hold
// rubbish that multiplication does not read.
#pragma once

#include "../../wire/philox.h"
#include "simd.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kGroupDraws = 8;                       // 16-bit draws of a group
constexpr int kRunDraws = kWideLanes * kGroupDraws;  // and of a run of groups

class WidePhilox {
 public:
  explicit WidePhilox(const DrawKey& key) : key_(key) {
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      k0_[round] = k0, k1_[round] = k1;
      k0 += kPhiloxW0, k1 += kPhiloxW1;
    }
  }

  // The words of kRuns * kWideLanes groups from `group` on, four a group, each 64-bit pair of bits
  // turned where `flip` has a one. Several runs side by side: each round waits for the one before.
  template <int kRuns = 1>
  void groups(uint64_t group, uint32_t* words, uint64_t flip = 0) const {
    Wide c0[kRuns], c1[kRuns], c2[kRuns], c3[kRuns];
    for (int r = 0; r < kRuns; ++r) {
      c0[r] = wide_add(wide_set1(group + static_cast<uint64_t>(r * kWideLanes)), wide_groups());
      c1[r] = wide_high(c0[r]);
      c2[r] = wide_set1(key_.c2), c3[r] = wide_set1(key_.ordinal);
    }
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int r = 0; r < kRuns; ++r) {
        const Wide p0 = wide_mul32(c0[r], wide_set1(kPhiloxM0));
        const Wide p1 = wide_mul32(c2[r], wide_set1(kPhiloxM1));
        c0[r] = wide_xor3(wide_high(p1), c1[r], wide_set1(k0_[round]));
        c2[r] = wide_xor3(wide_high(p0), c3[r], wide_set1(k1_[round]));
        c1[r] = p1;
        c3[r] = p0;
      }
    }
    const Wide turn = wide_set1(flip);
    for (int r = 0; r < kRuns; ++r) {
      store_groups(words + r * 4 * kWideLanes, wide_xor(c0[r], turn), wide_xor(c1[r], turn),
                   wide_xor(c2[r], turn), wide_xor(c3[r], turn));
    }
  }

  const DrawKey& key() const { return key_; }

 private:
  DrawKey key_;
  uint64_t k0_[kPhiloxRounds], k1_[kPhiloxRounds];
};

// Room for the 16-bit draws of up to kElements elements from any element on.
template <int kElements>
class DrawBuffer {
 public:
  // The draws of elements first ... first + n - 1, as 16-bit integers.
  const uint16_t* fill(const WidePhilox& philox, int64_t first, int n = kElements) {
    const int skip = static_cast<int>(first % kGroupDraws);
    const auto group = static_cast<uint64_t>(first / kGroupDraws);
    for (int i = 0; i < skip + n; i += kRunDraws) {
      philox.groups(group + static_cast<uint64_t>(i / kGroupDraws), words_ + i / 2);
    }
    return reinterpret_cast<const uint16_t*>(words_) + skip;
  }

 private:
  static constexpr int kRuns = (kElements + kGroupDraws - 1 + kRunDraws - 1) / kRunDraws;
  alignas(64) uint32_t words_[kRuns * kRunDraws / 2];
};

}  // namespace pydist::cpu::PYDIST_ISA
