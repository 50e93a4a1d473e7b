// Blocks of which the k largest entries travel: sizes, positions, ties. docs/wire_format.md says
// what the bits mean, pydist/reference/topk.py executes it.
//
// A block is its values, then its positions, which ascend. With Elias-Fano a position's low bits
// stand in one stream, and its high bits h in another, in which entry i is a 1 at bit h + i; a
// bitmap has the second stream alone, with a bit for every element.
#pragma once

#include "philox.h"
#include "rounding.h"

namespace pydist {

struct TopKFormat {
  int block;         // elements, a multiple of 32
  int low_bits;      // of a position; kBitmap: positions are a bitmap
  DType values;      // how a value travels
  uint64_t density;  // in units of 2^-32, at most 2^32
};

// Where blocks are written. Block k is row.word + its place in the row and starts at byte
// k * block_bytes; the payload ends at `bytes` (a short block before that is padded with zeros).
struct TopKEncode {
  TopKFormat format;
  unsigned char* payload;
  int64_t bytes;
  uint32_t seed, step;     // the order of ties
  const int64_t* step_at;  // CUDA: where the step is in device memory; null: `step` it is
};

// Where they are read: those of rank r are r * stride bytes further on.
struct TopKDecode {
  TopKFormat format;
  const unsigned char* payload;
  int64_t stride;
  int64_t ranks;
  float divisor;  // sums are divided by this: 1 for a sum, ranks for a mean
  bool clear;     // instead of the sum: zero what one payload has entries for, leave the rest
};

// The same for a row's own message, whose bytes may lie anywhere.
PYDIST_INLINE TopKEncode in_message(TopKEncode a, const Row& row) {
  a.payload += row.message;
  return a;
}
PYDIST_INLINE TopKDecode in_message(TopKDecode a, const Row& row) {
  a.payload += row.message;
  return a;
}

constexpr int kBitmap = -1;
constexpr uint32_t kTurnDomain = 0xC0000000u;  // second key word of the order of ties

PYDIST_INLINE int topk_entries(const TopKFormat& f, int n) {
  const uint64_t k = (static_cast<uint64_t>(n) * f.density + (uint64_t{1} << 31)) >> 32;
  return k ? static_cast<int>(k) : 1;
}

// Where the parts of a block of n elements are, in 32-bit words.
struct TopKLayout {
  int n, k;
  int low, high;  // first word of the low bits, and of the high ones
  int words;      // of the whole block
  int high_bits;
};

PYDIST_INLINE TopKLayout topk_layout(const TopKFormat& f, int n) {
  const bool bitmap = f.low_bits == kBitmap;
  const int k = topk_entries(f, n);
  const int low = f.values == DType::kFloat32 ? k : (k + 1) / 2;
  const int high = low + (bitmap ? 0 : static_cast<int>(words_for(k * f.low_bits)));
  const int bits = bitmap ? n : k + ((n - 1) >> f.low_bits);
  return {n, k, low, high, high + static_cast<int>(words_for(bits)), bits};
}

PYDIST_INLINE int64_t topk_block_bytes(const TopKFormat& f) {
  return int64_t{4} * topk_layout(f, f.block).words;
}

// Ties begin at this position of a block and go on from the start past the end.
PYDIST_INLINE int topk_turn(uint32_t seed, uint32_t step, int64_t ordinal, int64_t index, int n) {
  const DrawKey key = {seed, kTurnDomain, step, static_cast<uint32_t>(ordinal)};
  const uint64_t draw = draw_group(key, static_cast<uint64_t>(index)).v[0];
  return static_cast<int>((draw * static_cast<uint64_t>(n)) >> 32);
}

// Which of the tied elements are taken: `wanted` of them, from the turn on. `below` of all `ties`
// lie before the turn; a tie's number is how many ties lie before it in the block.
struct TopKTies {
  int turn, wanted, below, ties;
};

// How many of those before the turn are taken.
PYDIST_INLINE int taken_below(const TopKTies& t) {
  const int rest = t.wanted - (t.ties - t.below);
  return rest < 0 ? 0 : rest < t.below ? rest : t.below;
}
PYDIST_INLINE bool takes_tie(const TopKTies& t, int position, int number) {
  return position < t.turn ? number < taken_below(t) : number - t.below < t.wanted;
}
// How many are taken before `position`, where `number` ties lie before it.
PYDIST_INLINE int taken_before(const TopKTies& t, int position, int number) {
  const int low = taken_below(t);
  if (position < t.turn) return number < low ? number : low;
  const int high = number - t.below;
  return low + (high < t.wanted ? high : t.wanted);
}

// A value as it travels in 16 bits: what would become infinite is the largest number.
PYDIST_INLINE uint32_t held_half(float x) {
  Half h;
  from_float(x, &h);
  return (h.bits & 0x7FFFu) == 0x7C00u ? h.bits - 1u : h.bits;
}
PYDIST_INLINE uint32_t held_bfloat(float x) {
  BFloat b;
  from_float(x, &b);
  return (b.bits & 0x7FFFu) == 0x7F80u ? b.bits - 1u : b.bits;
}

// The float32 that a value is once it has travelled.
PYDIST_INLINE float travelled(DType values, float x) {
  if (values == DType::kFloat32) return x;
  if (values == DType::kFloat16) return to_float(Half{static_cast<uint16_t>(held_half(x))});
  return to_float(BFloat{static_cast<uint16_t>(held_bfloat(x))});
}

}  // namespace pydist
