// The vectors of simd.h without vectors: one float, one 64-bit lane.
#pragma once

#include <cstring>

#include "../../wire/rounding.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kLanes = 1;
using Vec = float;
using Mask = bool;

PYDIST_INLINE Vec set1(float x) { return x; }
PYDIST_INLINE Vec add(Vec a, Vec b) { return a + b; }
PYDIST_INLINE Vec sub(Vec a, Vec b) { return a - b; }
PYDIST_INLINE Vec mul(Vec a, Vec b) { return a * b; }
PYDIST_INLINE Vec div(Vec a, Vec b) { return a / b; }
PYDIST_INLINE Mask greater(Vec a, Vec b) { return a > b; }
PYDIST_INLINE Mask greater_equal(Vec a, Vec b) { return a >= b; }
PYDIST_INLINE Vec select(Mask m, Vec yes, Vec no) { return m ? yes : no; }
PYDIST_INLINE Vec min(Vec a, Vec b) { return b < a ? b : a; }
PYDIST_INLINE Vec max(Vec a, Vec b) { return a < b ? b : a; }
PYDIST_INLINE uint32_t top_bits(Vec x) { return float_bits(x); }
PYDIST_INLINE Vec max_bits(Vec a, Vec b) { return top_bits(a) < top_bits(b) ? b : a; }
PYDIST_INLINE Vec abs(Vec x) { return bits_float(float_bits(x) & kAbsMask); }
PYDIST_INLINE Mask both(Mask a, Mask b) { return a && b; }
PYDIST_INLINE uint32_t bits_of(Mask m) { return m; }
PYDIST_INLINE Mask mask_from(uint32_t bits) { return bits & 1u; }
PYDIST_INLINE Mask abs_below(Vec x, uint32_t limit) { return (float_bits(x) & kAbsMask) < limit; }
template <typename T>
PYDIST_INLINE Vec load(const T* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return to_float(x);
}
template <typename T>
PYDIST_INLINE void store(T* p, Vec x) {
  T y;
  from_float(x, &y);
  std::memcpy(p, &y, sizeof(T));
}

PYDIST_INLINE void stream(float* p, Vec x) { *p = x; }
PYDIST_INLINE void stream_end() {}

PYDIST_INLINE Vec from_integers(Vec x) { return static_cast<float>(float_bits(x)); }
PYDIST_INLINE Vec load_bytes(const uint8_t* p) { return *p; }
PYDIST_INLINE Vec load_half_bits(const uint16_t* p) {
  uint16_t x;
  std::memcpy(&x, p, sizeof(x));  // a word's half: no uint16_t to the compiler
  return bits_float(x);
}
PYDIST_INLINE Vec add_bits(Vec a, Vec b) { return bits_float(float_bits(a) + float_bits(b)); }
PYDIST_INLINE Vec sub_bits(Vec a, Vec b) { return bits_float(float_bits(a) - float_bits(b)); }
PYDIST_INLINE Mask sign_bit(Vec x) { return float_bits(x) >> 31; }
PYDIST_INLINE Vec ceil_bits(Vec x) {
  const float scaled = x * 65536.0f;
  const auto whole = static_cast<uint32_t>(scaled);
  return bits_float(whole + (static_cast<float>(whole) < scaled));
}
PYDIST_INLINE void store_low_bytes(uint8_t* p, Vec x) { *p = static_cast<uint8_t>(float_bits(x)); }

PYDIST_INLINE int store_places(uint32_t* p, uint32_t lanes, uint32_t base) {
  return store_places_one_by_one(p, lanes, base);
}

constexpr int kWideLanes = 1;
using Wide = uint64_t;
PYDIST_INLINE Wide wide_load(const void* p) {
  Wide x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
PYDIST_INLINE void wide_store(void* p, Wide x) { std::memcpy(p, &x, sizeof(x)); }
PYDIST_INLINE void wide_stream(void* p, Wide x) { wide_store(p, x); }
PYDIST_INLINE Wide wide_set1(uint64_t x) { return x; }
PYDIST_INLINE Wide wide_mul32(Wide a, Wide b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
PYDIST_INLINE Wide wide_xor(Wide a, Wide b) { return a ^ b; }
PYDIST_INLINE Wide wide_add(Wide a, Wide b) { return a + b; }
PYDIST_INLINE Wide wide_high(Wide x) { return x >> 32; }
PYDIST_INLINE Wide wide_and(Wide a, Wide b) { return a & b; }
PYDIST_INLINE Wide wide_or(Wide a, Wide b) { return a | b; }
PYDIST_INLINE Wide wide_and_not(Wide a, Wide b) { return a & ~b; }
PYDIST_INLINE Wide wide_xor3(Wide a, Wide b, Wide c) { return a ^ b ^ c; }
PYDIST_INLINE Wide wide_majority(Wide a, Wide b, Wide c) { return (a & b) | (c & (a ^ b)); }
PYDIST_INLINE Wide wide_shift_left(Wide x, int n) { return x << n; }
PYDIST_INLINE Wide wide_shift_right(Wide x, int n) { return x >> n; }
template <typename U>
PYDIST_INLINE Wide choose(uint32_t bits, U yes, U no) {
  Wide x = 0;
  for (unsigned lane = 0; lane < sizeof(Wide) / sizeof(U); ++lane) {
    x |= static_cast<Wide>(bits >> lane & 1u ? yes : no) << (8 * sizeof(U) * lane);
  }
  return x;
}
PYDIST_INLINE uint32_t halves_below(const void* p, uint16_t from, uint16_t limit) {
  uint32_t bits = 0;
  for (int j = 0; j < 32; ++j) {
    uint16_t x;
    std::memcpy(&x, static_cast<const unsigned char*>(p) + 2 * j, sizeof(x));
    bits |= static_cast<uint32_t>(static_cast<uint16_t>(x - from) < limit) << j;
  }
  return bits;
}

template <int kByte = 0>
PYDIST_INLINE Wide narrow_bytes(const Vec* v) {
  Wide x = 0;
  for (int k = 0; k < 8; ++k) {
    x |= static_cast<Wide>(float_bits(v[k]) >> (8 * kByte) & 0xFFu) << (8 * k);
  }
  return x;
}

template <int kCodes>
PYDIST_INLINE void load_codes(const unsigned char* p, int bits, Vec* v) {
  static_assert(kCodes == 8, "whole vectors");
  const uint64_t field = load_field(p, bits);
  for (int k = 0; k < 8; ++k) {
    v[k] = bits_float(static_cast<uint32_t>(field >> (k * bits)) & ((1u << bits) - 1u));
  }
}
template <int kFields>
PYDIST_INLINE void store_fields(unsigned char* p, Wide x, int bits) {
  static_assert(kFields == 1, "all lanes");
  store_field(p, x, bits);
}

PYDIST_INLINE Wide wide_groups() { return 0; }
PYDIST_INLINE void store_groups(uint32_t* p, Wide v0, Wide v1, Wide v2, Wide v3) {
  p[0] = static_cast<uint32_t>(v0);
  p[1] = static_cast<uint32_t>(v1);
  p[2] = static_cast<uint32_t>(v2);
  p[3] = static_cast<uint32_t>(v3);
}

}  // namespace pydist::cpu::PYDIST_ISA
