// A few float32 lanes (Vec) and a few 64-bit lanes (Wide), once for each instruction set.
//
// Kernels are written once against this interface and compiled once for each instruction set, with
// PYDIST_ISA naming the namespace and PYDIST_SIMD_<instruction set> the vectors. Everything is
// internal to its translation unit (see layout.h).
//
//   Vec, Mask, kLanes     kLanes floats and a truth value for each; a comparison with NaN is false
//   load, store           any address, any type; store rounds to nearest even, one NaN only
//   choose                a vector of as many bit patterns of 16 or 32 bits as fit: one of two,
//                         by the lowest bits, lane 0's the lowest; the bits above don't matter
//   halves_below          of a word's 32 integers of 16 bits, those for which x - from, modulo
//   2^16,
//                         is below the limit, as bits
//   stream, stream_end    whole aligned vectors of float32 without NaN, past the caches where there
//                         is an instruction for it; stream_end orders them before later stores
//   load_bytes, load_halves   unsigned integers of 8 and 16 bits as floats
//   load_half_bits        those of 16 bits as bit patterns
//   add_bits, sub_bits    of bit patterns as integers, modulo 2^32
//   sign_bit              of each lane, as a Mask for select alone
//   ceil_bits             the smallest integer not below x * 2^16, for x in [0, 128), in the low 24
//                         bits; the others are the same for every x
//   store_low_bytes       the lowest byte of each lane's bit pattern
//   load_codes            kCodes codes of 1 to 7 bits that follow each other, 8 * kWideLanes (or
//                         32, if those are more), as bit patterns of Vecs; reads nothing else
//   from_integers         such bit patterns as floats
//   narrow_bytes          a byte (the lowest) of 8 * kWideLanes / kLanes Vecs' bit patterns
//   min, max              of numbers; with NaN, either
//   max_bits              of bit patterns without sign, as integers: NaN is above all numbers
//   top_bits              the largest of a Vec's lanes, likewise
//   bits_of, mask_from    a Mask as kLanes bits, lane 0 the lowest; and back
//   abs_below             |x| below the limit, decided on the bit pattern
//   store_places          base + the numbers of the lanes whose bits are set, ascending; returns
//                         how many. May write kLanes numbers
//   Wide, kWideLanes      64-bit lanes: bits to be counted, or the products that Philox is made of
//                         (wide_mul32 reads the low halves; wide_high moves the high ones there)
//   store_fields          the lowest `bits` bytes of the first kFields lanes, without a gap; what
//                         else a lane holds must be zero; writes nothing else
//   wide_groups           which Philox group each lane holds, such that store_groups() can write
//                         the low halves of the four counters group by group: kWideLanes groups of
//                         four words
#pragma once

#include <cstring>

#include "../../wire/rounding.h"
#include "../kernels.h"

namespace pydist::cpu::PYDIST_ISA {

// Payloads are little-endian and need not be aligned.
PYDIST_INLINE uint32_t load_word(const unsigned char* p) {
  uint32_t w;
  std::memcpy(&w, p, 4);
  return w;
}
PYDIST_INLINE void store_word(unsigned char* p, uint32_t w) { std::memcpy(p, &w, 4); }

// `bytes` of 1 to 8 bytes as the low end of a number, for vectors that can't do better. From four
// on as two words, which overlap.
PYDIST_INLINE uint64_t load_field(const unsigned char* p, int bytes) {
  if (bytes >= 4) {
    return load_word(p) | static_cast<uint64_t>(load_word(p + bytes - 4)) << (8 * (bytes - 4));
  }
  uint64_t x = p[0];
  if (bytes > 1) x |= static_cast<uint64_t>(p[1]) << 8;
  if (bytes > 2) x |= static_cast<uint64_t>(p[2]) << 16;
  return x;
}
PYDIST_INLINE void store_field(unsigned char* p, uint64_t x, int bytes) {
  if (bytes >= 4) {
    store_word(p, static_cast<uint32_t>(x));
    store_word(p + bytes - 4, static_cast<uint32_t>(x >> (8 * (bytes - 4))));
    return;
  }
  for (int b = 0; b < bytes; ++b) p[b] = static_cast<unsigned char>(x >> (8 * b));
}

// For instruction sets that have nothing better.
PYDIST_INLINE int store_places_one_by_one(uint32_t* p, uint32_t lanes, uint32_t base) {
  int count = 0;
  for (; lanes; lanes &= lanes - 1) {
    p[count++] = base + static_cast<uint32_t>(__builtin_ctz(lanes));
  }
  return count;
}

}  // namespace pydist::cpu::PYDIST_ISA

#if defined(PYDIST_SIMD_AVX512)
#include "avx512.h"
#elif defined(PYDIST_SIMD_AVX2)
#include "avx2.h"
#elif defined(PYDIST_SIMD_NEON)
#include "neon.h"
#else
#include "scalar.h"
#endif

namespace pydist::cpu::PYDIST_ISA {

PYDIST_INLINE Vec load_halves(const uint16_t* p) { return from_integers(load_half_bits(p)); }

constexpr uint32_t kLaneMask = kLanes == 32 ? 0xFFFFFFFFu : (1u << kLanes) - 1u;

// Whether stream() may store here.
PYDIST_INLINE bool can_stream(const float* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0;
}
template <typename T>
PYDIST_INLINE bool can_stream(const T*) {
  return false;
}
template <typename T>
PYDIST_INLINE void stream(T* p, Vec x) {
  store(p, x);
}

// Brings lines into the caches that a loop reaches later.
PYDIST_INLINE void fetch(const void* p, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t b = 0; b < bytes; b += kLine) {
    __builtin_prefetch(static_cast<const char*>(p) + b);
  }
}
constexpr size_t kAhead = 2048;

// Loops that are as fast as memory leave all to the processor's own prefetcher, run of bytes by run
// of bytes, but for the one thing that it does not do: it stops at the end of a page. With the
// first run of a page the first lines of the next one are asked for. (A loop that packs float32
// alone, on one Zen 4, against a plain sum of the same compiled beside it: with every line asked
// for 0.87 of its bandwidth from memory and 0.82 from L3, without any 1.03 and 0.95, this way 1.07
// and 0.92. In whole calls of 32 Mi elements the difference is within the noise of a shared
// machine.)
PYDIST_INLINE void walks(const void* p, size_t bytes) {
  constexpr size_t kPage = 4096, kFirst = 256;
  if (reinterpret_cast<uintptr_t>(p) % kPage < bytes) {
    fetch(static_cast<const char*>(p) + kPage, kFirst);
  }
}
// The same for a loop over words of elements that computes with each. Where these have 16 bits a
// line takes so long that memory would rest: there each line is asked for.
template <typename T>
PYDIST_INLINE void walks_word(const T* x) {
  if (sizeof(T) == sizeof(float)) {
    walks(x, kWordBits * sizeof(T));
  } else {
    fetch(reinterpret_cast<const char*>(x) + kAhead, kWordBits * sizeof(T));
  }
}

}  // namespace pydist::cpu::PYDIST_ISA
