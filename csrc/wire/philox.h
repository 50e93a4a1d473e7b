// Counter-based random bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011). A draw is a function of its place alone, so it is the same on
// every backend, in any order and under any number of threads.
#pragma once

#include "layout.h"

namespace pydist {

struct Philox4 {
  uint32_t v[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

PYDIST_INLINE Philox4 philox4x32(Philox4 c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.v[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.v[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// The place of a draw, apart from its group: counter = (group low, group high, c2, ordinal).
struct DrawKey {
  uint32_t k0;       // seed
  uint32_t k1;       // rank << 2 | phase, or kTieDomain
  uint32_t c2;       // step, or step >> 1 for ties
  uint32_t ordinal;  // the parameter's place in named_parameters()
};

// Ties belong to no rank; this key cannot collide with rank << 2 | phase (ranks stay below 2^16).
constexpr uint32_t kTieDomain = 0x80000000u;

PYDIST_INLINE Philox4 draw_group(const DrawKey& key, uint64_t group) {
  return philox4x32(
      {{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), key.c2, key.ordinal}},
      key.k0, key.k1);
}

// 16-bit draw of element i: lane i % 8 of group i / 8 (low half of a word first).
PYDIST_INLINE uint32_t draw16(const Philox4& group, int lane) {
  return (group.v[lane >> 1] >> ((lane & 1) * 16)) & 0xFFFFu;
}

// The tie bits of elements 32*word ... 32*word+31 before the step's parity is folded in:
// word % 4 of group word / 4.
PYDIST_INLINE uint32_t tie_word(const DrawKey& key, uint64_t word) {
  return draw_group(key, word >> 2).v[word & 3];
}

// Elements of a row need not start on a multiple of 32 inside their parameter (a shard of a
// parameter): the tie bits of elements element ... element+31, from two neighbouring words.
PYDIST_INLINE uint32_t tie_word_at(const DrawKey& key, int64_t element) {
  const uint64_t word = static_cast<uint64_t>(element) >> 5;
  const int shift = static_cast<int>(element & 31);
  const uint32_t low = tie_word(key, word);
  return shift ? (low >> shift) | (tie_word(key, word + 1) << (32 - shift)) : low;
}

}  // namespace pydist
