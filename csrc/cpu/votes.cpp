// count_votes and majority_vote: bit-sliced addition over ranks, 32 elements a machine word.
//
// The loops over kTile words have a constant trip count and no branches, so that the compiler turns
// them into whole vectors for the instruction set at hand.
#include "simd.h"
#include "table.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kTile = 64;           // words a pass: 2,048 elements
constexpr int kGroups = kTile / 4;  // Philox groups that make kTile tie words

using Tile = uint32_t[kTile];

static void load_tile(const unsigned char* p, int words, uint32_t* tile) {
  if (words == kTile) {
    std::memcpy(tile, p, sizeof(Tile));
  } else {
    std::memset(tile, 0, sizeof(Tile));
    std::memcpy(tile, p, 4 * static_cast<size_t>(words));
  }
}

// Adds one bit an element to the counters held in planes[0, used): a ripple of half adders.
static void add_votes(Tile* planes, int used, uint32_t* carry) {
  for (int k = 0; k < used; ++k) {
    for (int i = 0; i < kTile; ++i) {
      const uint32_t both = planes[k][i] & carry[i];
      planes[k][i] ^= carry[i];
      carry[i] = both;
    }
  }
}

static void count_tile(const VoteArgs& a, int64_t word, int words, Tile* planes, int count) {
  for (int k = 0; k < count; ++k) std::memset(planes[k], 0, sizeof(Tile));
  Tile carry;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    load_tile(a.payloads + rank * a.stride + 4 * word, words, carry);
    add_votes(planes, planes_for(rank + 1), carry);  // counts so far are at most rank + 1
  }
}

// above: count > half of the ranks; tied: count == half (never for an odd number of ranks).
static void compare_with_half(const Tile* planes, int count, int64_t ranks, uint32_t* above,
                              uint32_t* tied) {
  const int64_t half = ranks / 2;
  for (int i = 0; i < kTile; ++i) {
    above[i] = 0;
    tied[i] = 0xFFFFFFFFu;
  }
  for (int k = count - 1; k >= 0; --k) {
    if ((half >> k) & 1) {
      for (int i = 0; i < kTile; ++i) tied[i] &= planes[k][i];
    } else {
      for (int i = 0; i < kTile; ++i) {
        above[i] |= tied[i] & planes[k][i];
        tied[i] &= ~planes[k][i];
      }
    }
  }
  if (ranks % 2) {
    // half was rounded down: "equal" to it means the minority side.
    for (int i = 0; i < kTile; ++i) tied[i] = 0;
  }
}

// kGroups Philox groups from `group` on, several side by side. The upper halves of the 64-bit lanes
// hold rubbish that multiplication does not read.
static void draw_tile(const DrawKey& key, uint64_t group, uint32_t* words) {
  for (int g = 0; g < kGroups; g += kWideLanes) {
    uint64_t low[kWideLanes], high[kWideLanes];
    for (int l = 0; l < kWideLanes; ++l) {
      low[l] = group + g + l;
      high[l] = low[l] >> 32;
    }
    Wide c0 = wide_load(low), c1 = wide_load(high);
    Wide c2 = wide_set1(key.c2), c3 = wide_set1(key.ordinal);
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Wide p0 = wide_mul32(c0, wide_set1(kPhiloxM0));
      const Wide p1 = wide_mul32(c2, wide_set1(kPhiloxM1));
      c0 = wide_xor(wide_xor(wide_high(p1), c1), wide_set1(k0));
      c2 = wide_xor(wide_xor(wide_high(p0), c3), wide_set1(k1));
      c1 = p1;
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    uint64_t out[4][kWideLanes];
    wide_store(out[0], c0);
    wide_store(out[1], c1);
    wide_store(out[2], c2);
    wide_store(out[3], c3);
    for (int l = 0; l < kWideLanes; ++l) {
      for (int j = 0; j < 4; ++j) words[4 * (g + l) + j] = static_cast<uint32_t>(out[j][l]);
    }
  }
}

// The answers for ties of elements first ... first + 32 * kTile - 1, the step's parity folded in.
static void tie_tile(const VoteArgs& a, int64_t ordinal, int64_t first, uint32_t* ties) {
  const DrawKey key = {a.seed, kTieDomain, static_cast<uint32_t>(a.step >> 1),
                       static_cast<uint32_t>(ordinal)};
  if (first % (4 * kWordBits) == 0) {
    draw_tile(key, static_cast<uint64_t>(first) / (4 * kWordBits), ties);
  } else {
    for (int i = 0; i < kTile; ++i) ties[i] = tie_word_at(key, first + i * kWordBits);
  }
  const uint32_t parity = a.step & 1 ? 0xFFFFFFFFu : 0u;
  for (int i = 0; i < kTile; ++i) ties[i] ^= parity;
}

// Stores a tile of one plane; padding bits of the row's last word become 0.
static void store_tile(const VoteArgs& a, int plane, int64_t word, int words, int64_t elements,
                       uint32_t* tile) {
  const int64_t rest = elements - static_cast<int64_t>(words - 1) * kWordBits;
  tile[words - 1] &= word_mask(rest);
  std::memcpy(a.out + plane * a.plane_bytes + 4 * word, tile, 4 * static_cast<size_t>(words));
}

void count_votes(const VoteArgs& a, const Row& row) {
  const int count = planes_for(a.ranks);
  Tile planes[kMaxPlanes];
  for (int64_t i = 0; i < row.n; i += kTile * kWordBits) {
    const int64_t elements = row.n - i < kTile * kWordBits ? row.n - i : kTile * kWordBits;
    const int64_t word = row.word + i / kWordBits;
    const int words = static_cast<int>(words_for(elements));
    count_tile(a, word, words, planes, count);
    for (int k = 0; k < count; ++k) store_tile(a, k, word, words, elements, planes[k]);
  }
}

void majority_vote(const VoteArgs& a, const Row& row) {
  const int count = planes_for(a.ranks);
  const bool can_tie = a.ranks % 2 == 0;
  Tile planes[kMaxPlanes], sign, tied, ties;
  for (int64_t i = 0; i < row.n; i += kTile * kWordBits) {
    const int64_t elements = row.n - i < kTile * kWordBits ? row.n - i : kTile * kWordBits;
    const int64_t word = row.word + i / kWordBits;
    const int words = static_cast<int>(words_for(elements));
    count_tile(a, word, words, planes, count);
    compare_with_half(planes, count, a.ranks, sign, tied);
    if (a.ties == Ties::kHash && can_tie) {
      tie_tile(a, row.ordinal, row.first + i, ties);
      for (int w = 0; w < kTile; ++w) sign[w] |= tied[w] & ties[w];
    } else if (a.ties == Ties::kPositive) {
      for (int w = 0; w < kTile; ++w) sign[w] |= tied[w];
    }
    store_tile(a, 0, word, words, elements, sign);
    if (a.ties == Ties::kZero) {
      for (int w = 0; w < kTile; ++w) tied[w] = ~tied[w];
      store_tile(a, 1, word, words, elements, tied);
    }
  }
}

}  // namespace pydist::cpu::PYDIST_ISA
