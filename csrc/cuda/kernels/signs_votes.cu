// count_votes and majority_vote: bit-sliced addition over ranks, 128 elements per thread.
//
// A thread owns four consecutive words of a row: one 16-byte load a rank, and one Philox group
// answers its ties. Seven ranks at a time are summed by full adders (two LOP3 each) into a number
// of three bits, which is added to the counters; counters are planes in registers. Reads ranks / 8
// bytes per element, writes 1/8 for every plane.
#include "../rows.cuh"

namespace pydist::cuda {
namespace {

constexpr int kLaneWords = 4;
constexpr int kVoteTile = kLaneWords * kWarpSize;

// How payloads may be touched: by their addresses, strides, and whether the chunk is whole.
enum class Access { kBytes, kWords, kVectors };

struct Words {
  uint32_t v[kLaneWords];
};

template <Access kAccess>
PYDIST_DEVICE Words load_words(const unsigned char* p, int words) {
  if constexpr (kAccess == Access::kVectors) {
    const uint4 q = *reinterpret_cast<const uint4*>(p);
    return {{q.x, q.y, q.z, q.w}};
  } else {
    Words w;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      w.v[i] = 0;
      if (i >= words) continue;
      w.v[i] = kAccess == Access::kWords ? reinterpret_cast<const uint32_t*>(p)[i]
                                         : load_word_bytes(p + 4 * i);
    }
    return w;
  }
}

// Stores the words of n elements; padding bits of the row's last word become 0.
template <Access kAccess>
PYDIST_DEVICE void store_words(unsigned char* p, const Words& w, int n) {
  if constexpr (kAccess == Access::kVectors) {
    *reinterpret_cast<uint4*>(p) = make_uint4(w.v[0], w.v[1], w.v[2], w.v[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      const int rest = n - i * kWordBits;
      if (rest <= 0) continue;
      const uint32_t word = w.v[i] & word_mask(rest);
      if (kAccess == Access::kWords) {
        reinterpret_cast<uint32_t*>(p)[i] = word;
      } else {
        store_word_bytes(p + 4 * i, word);
      }
    }
  }
}

PYDIST_DEVICE void full_add(uint32_t a, uint32_t b, uint32_t c, uint32_t* sum, uint32_t* carry) {
  *sum = a ^ b ^ c;
  *carry = (a & b) | (a & c) | (b & c);
}

// Votes added at a time: two planes hold at most three, and sixteen planes leave few registers.
template <int kPlanes>
constexpr int kVoteBatch = kPlanes == 2 || kPlanes == 16 ? 3 : 7;

// Adds three or seven votes (the others are zero) of word i to the counters.
template <int kPlanes>
PYDIST_DEVICE void add_votes(const Words (&votes)[7], int i, Words (&planes)[kPlanes]) {
  uint32_t s0, s1, c0, c1, c2, number[3];
  full_add(votes[0].v[i], votes[1].v[i], votes[2].v[i], &s0, &c0);
  full_add(votes[3].v[i], votes[4].v[i], votes[5].v[i], &s1, &c1);
  full_add(s0, s1, votes[6].v[i], &number[0], &c2);
  full_add(c0, c1, c2, &number[1], &number[2]);
  uint32_t carry = 0;
#pragma unroll
  for (int k = 0; k < kPlanes; ++k) {
    full_add(planes[k].v[i], k < 3 ? number[k] : 0u, carry, &planes[k].v[i], &carry);
  }
}

template <int kPlanes, Access kAccess>
PYDIST_DEVICE void count_lane(const VoteArgs& a, const unsigned char* in, int words,
                              Words (&planes)[kPlanes]) {
  constexpr int kBatch = kVoteBatch<kPlanes>;
#pragma unroll
  for (int k = 0; k < kPlanes; ++k) planes[k] = Words{};
#pragma unroll 1
  for (int64_t rank = 0; rank < a.ranks; rank += kBatch) {
    Words votes[7] = {};
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      if (rank + r < a.ranks) votes[r] = load_words<kAccess>(in + (rank + r) * a.stride, words);
    }
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) add_votes(votes, i, planes);
  }
}

// above: count > half of the ranks; tied: count == half (never for an odd number of ranks).
template <int kPlanes>
PYDIST_DEVICE void compare_with_half(const Words (&planes)[kPlanes], int64_t ranks, Words* above,
                                     Words* tied) {
  const int64_t half = ranks / 2;
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) {
    uint32_t larger = 0, equal = 0xFFFFFFFFu;
#pragma unroll
    for (int k = kPlanes - 1; k >= 0; --k) {
      const uint32_t digit = (half >> k) & 1 ? 0xFFFFFFFFu : 0u;
      larger |= equal & planes[k].v[i] & ~digit;
      equal &= ~(planes[k].v[i] ^ digit);
    }
    above->v[i] = larger;
    // half was rounded down: "equal" to it means the minority side.
    tied->v[i] = ranks % 2 ? 0u : equal;
  }
}

// Writes the majority of a lane's n elements, the first of which is `element` of its parameter.
template <int kPlanes, Access kAccess>
PYDIST_DEVICE void decide(const VoteArgs& a, const Words (&planes)[kPlanes], const Row& row,
                          int64_t element, unsigned char* out, int n) {
  Words sign, tied;
  compare_with_half(planes, a.ranks, &sign, &tied);
  if (a.ties == Ties::kHash && a.ranks % 2 == 0) {
    const int64_t step = step_of(a);
    const DrawKey key = {a.seed, kTieDomain, static_cast<uint32_t>(step >> 1),
                         static_cast<uint32_t>(row.ordinal)};
    const Philox4 ties = draw_bits(key, static_cast<uint64_t>(element));
    const uint32_t parity = step & 1 ? 0xFFFFFFFFu : 0u;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) sign.v[i] |= tied.v[i] & (ties.v[i] ^ parity);
  } else if (a.ties == Ties::kPositive) {
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) sign.v[i] |= tied.v[i];
  }
  store_words<kAccess>(out, sign, n);
  if (a.ties == Ties::kZero) {
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) tied.v[i] = ~tied.v[i];
    store_words<kAccess>(out + a.plane_bytes, tied, n);
  }
}

// What a lane does in one chunk; lanes beyond the row's end have nothing to do.
template <int kPlanes, bool kMajority, Access kAccess>
PYDIST_DEVICE void vote_chunk(const VoteArgs& a, int count, const Row& row, int64_t start, int n) {
  const int from = lane_id() * kLaneWords * kWordBits;
  if (from >= n) return;
  const int rest = n - from < kLaneWords * kWordBits ? n - from : kLaneWords * kWordBits;
  const int64_t offset = 4 * (row.word + start + from / kWordBits);
  Words planes[kPlanes];
  count_lane<kPlanes, kAccess>(a, a.payloads + offset, (rest + kWordBits - 1) / kWordBits, planes);
  if constexpr (kMajority) {
    const int64_t element = row.first + start * kWordBits + from;
    decide<kPlanes, kAccess>(a, planes, row, element, a.out + offset, rest);
  } else {
#pragma unroll
    for (int k = 0; k < kPlanes; ++k) {
      if (k < count) store_words<kAccess>(a.out + k * a.plane_bytes + offset, planes[k], rest);
    }
  }
}

template <int kPlanes, bool kMajority>
__global__ void __launch_bounds__(kBlockThreads) votes_kernel(Rows rows, VoteArgs a, int count) {
  // Every address is a base plus multiples of these.
  const int64_t common = reinterpret_cast<int64_t>(a.payloads) | reinterpret_cast<int64_t>(a.out) |
                         (a.ranks > 1 ? a.stride : 0) | a.plane_bytes;
  for_chunks<kVoteTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kVoteTile>(row, start);
    if (n == kVoteTile * kWordBits && aligned<16>(common) && aligned<kLaneWords>(row.word)) {
      vote_chunk<kPlanes, kMajority, Access::kVectors>(a, count, row, start, n);
    } else if (aligned<4>(common)) {
      vote_chunk<kPlanes, kMajority, Access::kWords>(a, count, row, start, n);
    } else {
      vote_chunk<kPlanes, kMajority, Access::kBytes>(a, count, row, start, n);
    }
  });
}

// Counters in four sizes: an unused plane costs two operations for every seven ranks.
template <bool kMajority>
void launch_votes(const char* name, const Rows& rows, const VoteArgs& args, void* stream) {
  const int count = planes_for(args.ranks);
  const auto run = [&](auto kernel) {
    launch_over<kVoteTile>(name, kernel, rows, stream, args, count);
  };
  if (count <= 2) return run(votes_kernel<2, kMajority>);
  if (count <= 4) return run(votes_kernel<4, kMajority>);
  if (count <= 8) return run(votes_kernel<8, kMajority>);
  run(votes_kernel<16, kMajority>);
}

}  // namespace

void count_votes(const Rows& rows, const VoteArgs& args, void* stream) {
  launch_votes<false>("count_votes", rows, args, stream);
}

void majority_vote(const Rows& rows, const VoteArgs& args, void* stream) {
  launch_votes<true>("majority_vote", rows, args, stream);
}

}  // namespace pydist::cuda
