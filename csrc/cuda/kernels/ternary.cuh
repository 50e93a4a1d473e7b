// What the kernels of trits share: who takes which units, and sums over a byte's five trits.
//
// Narrow sums, of up to 15 ranks, are fields of a word: a byte's five trits are looked up as five
// fields of six bits, and one addition a rank adds them all. A lane takes four bytes of a unit, a
// warp four units at a time.
#pragma once

#include "../../wire/ternary.h"
#include "../nibbles.cuh"
#include "blocks.cuh"

namespace pydist::cuda {

constexpr int kWarpUnits = 16;  // what a warp takes; WARP_UNITS in pydist/kernels/ternary.py

// Calls body(row, unit, begin, n) for what this warp takes: first unit in the payload, first
// element in the row, elements. `words` of rows count so many units.
template <typename Body>
PYDIST_DEVICE void for_units(const Rows& rows, const Body& body) {
  for_blocks(rows, kWarpUnits * kUnit, [&](const Row& row, int64_t, int64_t begin, int n) {
    body(row, row.word + begin / kUnit, begin, n);
  });
}

// ------------------------------------------------------------ narrow sums

constexpr int kNarrowRanks = 15;
constexpr int kLaneBytes = 4;
constexpr int kLanesAUnit = kUnitBytes / kLaneBytes;
constexpr int kStepUnits = kWarpSize / kLanesAUnit;

constexpr int kFieldBits = 6;
constexpr int kFieldsBits = kDigits * kFieldBits;
constexpr uint32_t kOnes = 1u | 1u << 6 | 1u << 12 | 1u << 18 | 1u << 24;  // in every field
constexpr uint32_t kHalves = 32u * kOnes;
constexpr uint32_t kMalformed = 1u << 31;  // above all fields

// Of four bytes of a unit. Six bits of two's complement, as a field, are the sum of a digit.
using Fields = uint32_t[kLaneBytes];

// The trits of a byte, each plus one: no field is negative.
PYDIST_DEVICE uint32_t fields_of_byte(uint32_t byte) {
  if (byte > kLargestByte) return kOnes | kMalformed;
  uint32_t fields = kOnes;
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
    const uint32_t digit = byte % 3;  // 0 for zero, 1 for plus, 2 for minus
    fields = digit == 1 ? fields + (1u << (kFieldBits * i)) : fields;
    fields = digit == 2 ? fields - (1u << (kFieldBits * i)) : fields;
    byte /= 3;
  }
  return fields;
}

// fields_of_byte for all bytes, in shared memory. All threads of the block call it together.
PYDIST_DEVICE void fill_table(uint32_t (&table)[kBlockThreads]) {
  static_assert(kBlockThreads == 256, "a thread makes the entry of a byte");
  table[threadIdx.x] = fields_of_byte(threadIdx.x);
  __syncthreads();
}

// Adds the fields of four bytes of every rank. *seen gets the bits of what was added.
template <bool kAligned>
PYDIST_DEVICE void add_ranks(const TernarySource& a, const uint32_t* table, int64_t at, bool there,
                             Fields& fields, uint32_t* seen) {
  const unsigned char* p = a.data + at;
#pragma unroll 8
  for (int r = 0; r < static_cast<int>(a.ranks); ++r, p += a.stride) {
    uint32_t word = 0;
    if (there) word = kAligned ? *reinterpret_cast<const uint32_t*>(p) : load_word_bytes(p);
#pragma unroll
    for (int b = 0; b < kLaneBytes; ++b) {
      const uint32_t entry = table[word >> (8 * b) & 0xFFu];
      fields[b] += entry;
      *seen |= entry;
    }
  }
}

// The sums of this lane's four bytes of a unit; zeros of what isn't there. `even` says that words
// are aligned. A malformed byte counts as five zeros, and leaves kMalformed in *seen.
PYDIST_DEVICE void sum_fields(const TernarySource& a, bool even, const uint32_t* table,
                              int64_t unit, bool there, int lane, Fields& fields, uint32_t* seen) {
  const int64_t at = unit * kUnitBytes + kLaneBytes * (lane % kLanesAUnit);
  there = there && at < a.bytes;
  // Fields from 32 - ranks to 32 + ranks in the end: no field reaches into the next.
#pragma unroll
  for (int b = 0; b < kLaneBytes; ++b) {
    fields[b] = kOnes * (32u - static_cast<uint32_t>(a.ranks));
  }
  if (even) {
    add_ranks<true>(a, table, at, there, fields, seen);
  } else {
    add_ranks<false>(a, table, at, there, fields, seen);
  }
#pragma unroll
  for (int b = 0; b < kLaneBytes; ++b) fields[b] ^= kHalves;
}

// Where the words of a lane are among the bit planes of a unit's sums: word j holds bit 4 * lane +
// j of the fields of all 32 bytes.
struct PlanePlaces {
  int unit_bytes;           // of the planes
  int at[kLaneBytes];       // in bytes, or -1
  bool beyond[kLaneBytes];  // of a bit that has no plane; then `at` is that of the sign, its equal

  PYDIST_DEVICE_MEMBER PlanePlaces(int64_t ranks, int lane) {
    const int planes = sum_bits(ranks);
    unit_bytes = planes * kPlaneWords * 4;
#pragma unroll
    for (int j = 0; j < kLaneBytes; ++j) {
      const int bit = kNibble * (lane % kLanesAUnit) + j;
      const int plane = bit % kFieldBits, word = bit / kFieldBits;
      beyond[j] = plane >= planes;
      at[j] = bit < kFieldsBits ? 4 * ((beyond[j] ? planes - 1 : plane) * kPlaneWords + word) : -1;
    }
  }
};

// ------------------------------------------------------------ wide sums

// A lane has byte `lane` of a unit.
using Sums = int32_t[kDigits];

// What this lane's bytes of a unit add up to. A malformed byte is five zeros, and is told of.
PYDIST_DEVICE void sum_unit(const TernarySource& a, int64_t unit, int lane, Sums& sums, bool* bad) {
  const int64_t at = unit * kUnitBytes + lane;
  const bool there = at < a.bytes;
#pragma unroll
  for (int i = 0; i < kDigits; ++i) sums[i] = 0;
#pragma unroll 4
  for (int64_t r = 0; r < a.ranks; ++r) {
    uint32_t rest = there ? a.data[r * a.stride + at] : 0u;
    if (rest > kLargestByte) rest = 0, *bad = true;
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      const uint32_t quotient = (rest * 171) >> 9;  // by 3, below 512
      const uint32_t digit = rest - 3 * quotient;
      sums[i] += static_cast<int32_t>(digit & 1u) - static_cast<int32_t>(digit >> 1);
      rest = quotient;
    }
  }
}

}  // namespace pydist::cuda
