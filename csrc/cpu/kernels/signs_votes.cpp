// count_votes and majority_vote: bit-sliced carry-save addition over ranks, eight ranks at a time,
// as many elements side by side as a vector has bits. The last eight ranks (mostly the only ones)
// are added, compared and written in one go, so that nothing but payloads passes through memory.
#include "../simd/philox.h"
#include "../simd/simd.h"
#include "../table.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kTile = 128;             // words a pass: 4,096 elements
constexpr int kStep = 2 * kWideLanes;  // words in a vector
constexpr int kPair = 2 * kStep;       // words that one round of Philox on vectors makes
constexpr int kBatch = 8;              // ranks added at once
constexpr int kBatchPlanes = 4;        // planes that count kBatch ranks

using Tile = uint32_t[kTile];

// The votes of a rank that is not there.
struct Constant {
  Tile words;
  explicit Constant(uint32_t word) {
    for (uint32_t& w : words) w = word;
  }
};

// ------------------------------------------------------------ counting

// The counts of one vector of words: bit k of each is in plane k. Those of a single batch stay in
// registers, and their number is a constant.
template <int kPlanes>
struct Counts {
  Wide plane[kPlanes];

  int size(int count) const { return kPlanes == kBatchPlanes ? kPlanes : count; }
};

// One tile of up to kBatch ranks; of ranks that are not there some voted +1, the others -1.
struct Batch {
  const unsigned char* votes[kBatch];
  Tile copies[kBatch];  // where a tile is cut off by the end of the row
};

static void load_batch(const VoteArgs& a, int64_t rank, int64_t word, int64_t elements,
                       int64_t ones, Batch* batch) {
  static const Constant none(0), all(~0u);
  const auto words = static_cast<size_t>(words_for(elements));
  for (int r = 0; r < kBatch; ++r) {
    if (rank + r >= a.ranks) {
      const Constant& constant = rank + r < a.ranks + ones ? all : none;
      batch->votes[r] = reinterpret_cast<const unsigned char*>(constant.words);
      continue;
    }
    const unsigned char* votes = a.payloads + (rank + r) * a.stride + 4 * word;
    walks(votes, sizeof(Tile));
    if (words == kTile) {
      batch->votes[r] = votes;
    } else {
      std::memset(batch->copies[r], 0, sizeof(Tile));
      std::memcpy(batch->copies[r], votes, 4 * words);
      batch->votes[r] = reinterpret_cast<const unsigned char*>(batch->copies[r]);
    }
  }
}

// sum + 2 * return = sum + b + c, bit by bit.
PYDIST_INLINE Wide full_add(Wide* sum, Wide b, Wide c) {
  const Wide carry = wide_majority(b, c, *sum);
  *sum = wide_xor3(b, c, *sum);
  return carry;
}

// Adds the votes of a batch, words w to w + kStep - 1 of the tile: seven full adders (Harley and
// Seal), then a ripple into the planes of 8 and above.
template <int kPlanes>
PYDIST_INLINE void add_batch(const Batch& batch, int w, int count, Counts<kPlanes>* counts) {
  Wide* plane = counts->plane;
  const auto vote = [&](int r) { return wide_load(batch.votes[r] + 4 * w); };
  const Wide twos_a = full_add(&plane[0], vote(0), vote(1));
  const Wide twos_b = full_add(&plane[0], vote(2), vote(3));
  const Wide fours_a = full_add(&plane[1], twos_a, twos_b);
  const Wide twos_c = full_add(&plane[0], vote(4), vote(5));
  const Wide twos_d = full_add(&plane[0], vote(6), vote(7));
  const Wide fours_b = full_add(&plane[1], twos_c, twos_d);
  Wide carry = full_add(&plane[2], fours_a, fours_b);
  for (int k = 3; k < counts->size(count); ++k) {
    const Wide sum = wide_xor(plane[k], carry);
    carry = wide_and(plane[k], carry);
    plane[k] = sum;
  }
}

// Calls visit(w, counts of words w …, counts of words w + kStep …) for each pair of vectors of a
// tile. `planes` holds the counts of the batches before the last where there are several.
template <int kPlanes, typename Visit>
PYDIST_INLINE void for_counts(const Batch& batch, const Tile* planes, int count,
                              const Visit& visit) {
  for (int w = 0; w < kTile; w += kPair) {
    Counts<kPlanes> counts[2];
    for (int half = 0; half < 2; ++half) {
      const int at = w + half * kStep;
      for (int k = 0; k < counts[half].size(count); ++k) {
        counts[half].plane[k] = planes ? wide_load(planes[k] + at) : wide_set1(0);
      }
      add_batch(batch, at, count, &counts[half]);
    }
    visit(w, counts[0], counts[1]);
  }
}

// Planes that hold the counts of `seen` ranks while batches are added: at least a batch's own.
static int planes_while(int64_t seen) { return planes_for(seen < kBatch ? kBatch : seen); }

// Counts one tile of all ranks, and hands it to `visit` as for_counts does. The counts of a single
// batch are those with `ones` more votes for +1.
template <typename Visit>
static void visit_counts(const VoteArgs& a, int64_t word, int64_t elements, int64_t ones,
                         const Visit& visit) {
  Batch batch;
  if (a.ranks <= kBatch) {
    load_batch(a, 0, word, elements, ones, &batch);
    return for_counts<kBatchPlanes>(batch, nullptr, kBatchPlanes, visit);
  }
  Tile planes[kMaxPlanes];
  const int count = planes_for(a.ranks);
  for (int k = 0; k < count; ++k) std::memset(planes[k], 0, sizeof(Tile));
  int64_t rank = 0;
  for (; rank + kBatch < a.ranks; rank += kBatch) {
    load_batch(a, rank, word, elements, 0, &batch);
    const int grown = planes_while(rank + kBatch);  // counts so far fit these planes
    for_counts<kMaxPlanes>(batch, planes, grown, [&](int w, const auto& low, const auto& high) {
      for (int k = 0; k < grown; ++k) {
        wide_store(planes[k] + w, low.plane[k]);
        wide_store(planes[k] + w + kStep, high.plane[k]);
      }
    });
  }
  load_batch(a, rank, word, elements, 0, &batch);
  for_counts<kMaxPlanes>(batch, planes, count, visit);
}

// ------------------------------------------------------------ writing

// Planes larger than this go past the caches: what they overwrite is not read first, and they are
// on their way to the network anyway.
constexpr int64_t kStreamBytes = int64_t{1} << 20;

// Where a tile of one plane goes: to its place if it is whole, else through a copy.
class Output {
 public:
  void open(const VoteArgs& a, int plane, int64_t word, int64_t elements) {
    place_ = a.out + plane * a.plane_bytes + 4 * word;
    elements_ = elements;
    const bool whole = elements == kTile * kWordBits;
    to_ = whole ? place_ : reinterpret_cast<unsigned char*>(copy_);
    streams_ = whole && a.plane_bytes >= kStreamBytes &&
               reinterpret_cast<uintptr_t>(place_) % sizeof(Wide) == 0;
  }

  void put(int w, Wide x) {
    if (streams_) {
      wide_stream(to_ + 4 * w, x);
    } else {
      wide_store(to_ + 4 * w, x);
    }
  }

  // Padding bits of the row's last word become 0.
  void close() {
    if (to_ == place_) return;
    const int words = static_cast<int>(words_for(elements_));
    copy_[words - 1] &= word_mask(elements_ - static_cast<int64_t>(words - 1) * kWordBits);
    std::memcpy(place_, copy_, 4 * static_cast<size_t>(words));
  }

 private:
  unsigned char* place_;
  int64_t elements_;
  unsigned char* to_;
  bool streams_;
  Tile copy_;
};

// ------------------------------------------------------------ ties

// The tie draws of one row.
class TieDraws {
 public:
  TieDraws(const VoteArgs& a, const Row& row)
      : philox_({a.seed, kTieDomain, static_cast<uint32_t>(a.step >> 1),
                 static_cast<uint32_t>(row.ordinal)}),
        parity_(a.step & 1 ? ~uint64_t{0} : 0) {}

  // The answers for ties of a tile from element `first` on, the step's parity folded in.
  void draw(int64_t first, uint32_t* words) const {
    if (first % kGroupElements == 0) {
      constexpr int kRuns = kWideLanes == 8 ? 4 : 2;  // measured: as many as registers hold
      constexpr int kWords = kRuns * kPair;
      const auto group = static_cast<uint64_t>(first / kGroupElements);
      for (int w = 0; w < kTile; w += kWords) {
        philox_.groups<kRuns>(group + static_cast<uint64_t>(w / 4), words + w, parity_);
      }
      return;
    }
    for (int w = 0; w < kTile; ++w) {
      words[w] = tie_word_at(philox_.key(), first + w * kWordBits) ^ static_cast<uint32_t>(parity_);
    }
  }

 private:
  static constexpr int64_t kGroupElements = 4 * kWordBits;

  WidePhilox philox_;
  uint64_t parity_;
};

// ------------------------------------------------------------ the vote

// above: count > half of the ranks; tied: count == half (never for an odd number of ranks, where
// "equal" to the half rounded down means the minority side).
struct Verdict {
  Wide above, tied;
};

// A single batch: with this many votes for +1 more, half is always kBatch / 2.
static int64_t missing_half(int64_t ranks) { return kBatch / 2 - ranks / 2; }

PYDIST_INLINE Verdict compare_with_half(const Counts<kBatchPlanes>& counts, int, int64_t ranks) {
  const Wide* plane = counts.plane;
  const Wide low = wide_or(plane[0], plane[1]);
  const Wide tied = ranks % 2 ? wide_set1(0) : wide_and_not(plane[2], low);
  return {wide_or(plane[3], wide_and(plane[2], low)), tied};
}

PYDIST_INLINE Verdict compare_with_half(const Counts<kMaxPlanes>& counts, int count,
                                        int64_t ranks) {
  const int64_t half = ranks / 2;
  Verdict v = {wide_set1(0), wide_set1(~uint64_t{0})};
  for (int k = counts.size(count) - 1; k >= 0; --k) {
    const Wide plane = counts.plane[k];
    if ((half >> k) & 1) {
      v.tied = wide_and(v.tied, plane);
    } else {
      v.above = wide_or(v.above, wide_and(v.tied, plane));
      v.tied = wide_and_not(v.tied, plane);
    }
  }
  if (ranks % 2) v.tied = wide_set1(0);
  return v;
}

void count_votes(const VoteArgs& a, const Row& row) {
  const int count = planes_for(a.ranks);
  for (int64_t i = 0; i < row.n; i += kTile * kWordBits) {
    const int64_t elements = row.n - i < kTile * kWordBits ? row.n - i : kTile * kWordBits;
    const int64_t word = row.word + i / kWordBits;
    Output out[kMaxPlanes];
    for (int k = 0; k < count; ++k) out[k].open(a, k, word, elements);
    visit_counts(a, word, elements, 0, [&](int w, const auto& low, const auto& high) {
      for (int k = 0; k < count; ++k) {
        out[k].put(w, low.plane[k]);
        out[k].put(w + kStep, high.plane[k]);
      }
    });
    for (int k = 0; k < count; ++k) out[k].close();
  }
  stream_end();
}

// Asks for a pair of vectors of each rank a tile ahead, so that memory has something to do while
// ties are drawn.
PYDIST_INLINE void fetch_votes(const VoteArgs& a, int64_t word) {
  for (int64_t r = 0; r < a.ranks && r < kBatch; ++r) {
    fetch(a.payloads + r * a.stride + 4 * (word + kTile), 4 * kPair);
  }
}

void majority_vote(const VoteArgs& a, const Row& row) {
  const int count = planes_for(a.ranks);
  const int64_t ones = missing_half(a.ranks);
  const bool draws_ties = a.ties == Ties::kHash && a.ranks % 2 == 0;
  const TieDraws draws(a, row);
  for (int64_t i = 0; i < row.n; i += kTile * kWordBits) {
    const int64_t elements = row.n - i < kTile * kWordBits ? row.n - i : kTile * kWordBits;
    const int64_t word = row.word + i / kWordBits;
    Output sign, non_zero;
    sign.open(a, 0, word, elements);
    if (a.ties == Ties::kZero) non_zero.open(a, 1, word, elements);
    alignas(64) Tile ties;
    if (draws_ties) draws.draw(row.first + i, ties);
    visit_counts(a, word, elements, ones, [&](int w, const auto& low, const auto& high) {
      if (draws_ties) fetch_votes(a, word + w);
      const auto decide = [&](int at, const auto& counts, const uint32_t* tie) {
        const Verdict v = compare_with_half(counts, count, a.ranks);
        if (a.ties == Ties::kZero) {
          sign.put(at, v.above);
          non_zero.put(at, wide_and_not(wide_set1(~uint64_t{0}), v.tied));
        } else {
          const Wide broken = draws_ties ? wide_and(v.tied, wide_load(tie)) : v.tied;
          sign.put(at, wide_or(v.above, broken));
        }
      };
      decide(w, low, ties + w);
      decide(w + kStep, high, ties + w + kStep);
    });
    sign.close();
    if (a.ties == Ties::kZero) non_zero.close();
  }
  stream_end();
}

}  // namespace pydist::cpu::PYDIST_ISA
