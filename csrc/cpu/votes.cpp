// count_votes and majority_vote: bit-sliced carry-save addition over ranks, eight ranks at a time,
// as many elements side by side as a vector has bits.
#include "simd.h"
#include "table.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kTile = 64;           // words a pass: 2,048 elements
constexpr int kGroups = kTile / 4;  // Philox groups that make kTile tie words

constexpr int kStep = 2 * kWideLanes;  // words in a vector
constexpr int kBatch = 8;              // ranks added at once

using Tile = uint32_t[kTile];

// One tile of up to kBatch ranks; ranks that are not there voted -1.
struct Batch {
  const unsigned char* votes[kBatch];
  Tile copies[kBatch];  // where a tile is cut off by the end of the row
};

static void load_batch(const VoteArgs& a, int64_t rank, int64_t word, int words, Batch* batch) {
  static const Tile none = {};
  for (int r = 0; r < kBatch; ++r) {
    batch->votes[r] = reinterpret_cast<const unsigned char*>(none);
    if (rank + r >= a.ranks) continue;
    const unsigned char* votes = a.payloads + (rank + r) * a.stride + 4 * word;
    if (words == kTile) {
      batch->votes[r] = votes;
    } else {
      std::memset(batch->copies[r], 0, sizeof(Tile));
      std::memcpy(batch->copies[r], votes, 4 * static_cast<size_t>(words));
      batch->votes[r] = reinterpret_cast<const unsigned char*>(batch->copies[r]);
    }
  }
}

// sum + 2 * return = sum + b + c, bit by bit.
PYDIST_INLINE Wide full_add(Wide* sum, Wide b, Wide c) {
  const Wide carry = wide_majority(*sum, b, c);
  *sum = wide_xor3(*sum, b, c);
  return carry;
}

// Adds the votes of a batch to counters of `count` planes (kBatch ranks need four at the least):
// seven full adders a batch (Harley and Seal), then a ripple into the planes of 8 and above.
static void add_batch(const Batch& batch, Tile* planes, int count) {
  for (int w = 0; w < kTile; w += kStep) {
    const auto vote = [&](int r) {
      prefetch(batch.votes[r] + 4 * w, kAhead / 2);  // eight streams at once: less ahead in each
      return wide_load(batch.votes[r] + 4 * w);
    };
    Wide ones = wide_load(planes[0] + w);
    Wide twos = wide_load(planes[1] + w);
    Wide fours = wide_load(planes[2] + w);
    const Wide twos_a = full_add(&ones, vote(0), vote(1));
    const Wide twos_b = full_add(&ones, vote(2), vote(3));
    const Wide fours_a = full_add(&twos, twos_a, twos_b);
    const Wide twos_c = full_add(&ones, vote(4), vote(5));
    const Wide twos_d = full_add(&ones, vote(6), vote(7));
    const Wide fours_b = full_add(&twos, twos_c, twos_d);
    Wide carry = full_add(&fours, fours_a, fours_b);
    wide_store(planes[0] + w, ones);
    wide_store(planes[1] + w, twos);
    wide_store(planes[2] + w, fours);
    for (int k = 3; k < count; ++k) {
      const Wide plane = wide_load(planes[k] + w);
      wide_store(planes[k] + w, wide_xor(plane, carry));
      carry = wide_and(plane, carry);
    }
  }
}

static void count_tile(const VoteArgs& a, int64_t word, int words, Tile* planes, int count) {
  for (int k = 0; k < count || k < 3; ++k) std::memset(planes[k], 0, sizeof(Tile));
  Batch batch;
  for (int64_t rank = 0; rank < a.ranks; rank += kBatch) {
    load_batch(a, rank, word, words, &batch);
    const int64_t seen = rank + kBatch < a.ranks ? rank + kBatch : a.ranks;
    add_batch(batch, planes, planes_for(seen));  // counts so far are at most `seen`
  }
}

// above: count > half of the ranks; tied: count == half (never for an odd number of ranks).
static void compare_with_half(const Tile* planes, int count, int64_t ranks, uint32_t* above,
                              uint32_t* tied) {
  const int64_t half = ranks / 2;
  const Wide zero = wide_set1(0), all = wide_set1(~uint64_t{0});
  for (int w = 0; w < kTile; w += kStep) {
    Wide more = zero, same = all;
    for (int k = count - 1; k >= 0; --k) {
      const Wide plane = wide_load(planes[k] + w);
      if ((half >> k) & 1) {
        same = wide_and(same, plane);
      } else {
        more = wide_or(more, wide_and(same, plane));
        same = wide_and_not(same, plane);
      }
    }
    wide_store(above + w, more);
    // An odd half was rounded down: "equal" to it means the minority side.
    wide_store(tied + w, ranks % 2 ? zero : same);
  }
}

// kGroups Philox groups from `group` on, several side by side. The upper halves of the 64-bit lanes
// hold rubbish that multiplication does not read.
static void draw_tile(const DrawKey& key, uint64_t group, uint32_t* words) {
  for (int g = 0; g < kGroups; g += kWideLanes) {
    Wide c0 = wide_add(wide_set1(group + g), wide_groups());
    Wide c1 = wide_high(c0);
    Wide c2 = wide_set1(key.c2), c3 = wide_set1(key.ordinal);
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Wide p0 = wide_mul32(c0, wide_set1(kPhiloxM0));
      const Wide p1 = wide_mul32(c2, wide_set1(kPhiloxM1));
      c0 = wide_xor3(wide_high(p1), c1, wide_set1(k0));
      c2 = wide_xor3(wide_high(p0), c3, wide_set1(k1));
      c1 = p1;
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    store_groups(words + 4 * g, c0, c1, c2, c3);
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

// Planes larger than this go past the caches: what they overwrite is not read first, and they are
// on their way to the network anyway.
constexpr int64_t kStreamBytes = int64_t{1} << 20;

// Stores a tile of one plane; padding bits of the row's last word become 0.
static void store_tile(const VoteArgs& a, int plane, int64_t word, int words, int64_t elements,
                       uint32_t* tile) {
  const int64_t rest = elements - static_cast<int64_t>(words - 1) * kWordBits;
  tile[words - 1] &= word_mask(rest);
  unsigned char* out = a.out + plane * a.plane_bytes + 4 * word;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % sizeof(Wide) == 0;
  if (a.plane_bytes >= kStreamBytes && words == kTile && aligned) {
    for (int w = 0; w < kTile; w += kStep) wide_stream(out + 4 * w, wide_load(tile + w));
  } else {
    std::memcpy(out, tile, 4 * static_cast<size_t>(words));
  }
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
  stream_end();
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
  stream_end();
}

}  // namespace pydist::cpu::PYDIST_ISA
