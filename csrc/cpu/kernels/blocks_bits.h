// Codes of a few bits to the bytes of a payload and back, a Wide of codes at a time.
//
// A Wide holds kGroup codes as bytes. Eight of them are a 64-bit lane, and their stream a field of
// `bits` bytes: eight codes are pushed together in three steps, in all lanes at once, and
// store_fields (simd.h) writes the fields without a gap.
#pragma once

#include <type_traits>

#include "../simd/simd.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kGroup = 8 * kWideLanes;            // codes of a Wide: 8 to 64
constexpr int kGroupVecs = kGroup / kLanes;       // Vecs that hold as many numbers
constexpr int kHalf = kGroup < 32 ? kGroup : 32;  // what may be left of a multiple of 32

// What the steps from a byte a code to `bits` bits a code need, 1 to 8.
struct CodeBits {
  int bits;
  Wide low1, low2, low3;     // the lower of each two codes, of two pairs, of two fours
  Wide high1, high2, high3;  // and the upper ones, each as many bytes up
};

PYDIST_INLINE CodeBits code_bits(int bits) {
  const Wide low1 = wide_set1(0x0001000100010001u * ((1u << bits) - 1u));
  const Wide low2 = wide_set1(0x0000000100000001u * ((uint64_t{1} << (2 * bits)) - 1u));
  const Wide low3 = wide_set1((uint64_t{1} << (4 * bits)) - 1u);
  return {bits,
          low1,
          low2,
          low3,
          wide_shift_left(low1, 8),
          wide_shift_left(low2, 16),
          wide_shift_left(low3, 32)};
}

// Codes below 2^bits, a byte each, to fields; the rest of each lane is zero.
PYDIST_INLINE Wide squeezed(const CodeBits& form, Wide x) {
  const int step = 8 - form.bits;
  x = wide_or(wide_and(x, form.low1), wide_shift_right(wide_and(x, form.high1), step));
  x = wide_or(wide_and(x, form.low2), wide_shift_right(wide_and(x, form.high2), 2 * step));
  return wide_or(wide_and(x, form.low3), wide_shift_right(wide_and(x, form.high3), 4 * step));
}

// Writes the stream of kCodes codes and nothing more.
template <int kCodes>
PYDIST_INLINE void store_codes(const CodeBits& form, Wide codes, unsigned char* stream) {
  store_fields<kCodes / 8>(stream, squeezed(form, codes), form.bits);
}

// Calls body(j, integral constant) for the groups of n codes, a multiple of 32: how many of a
// group's codes there are is known to the compiler.
template <typename Body>
PYDIST_INLINE void for_groups(int n, const Body& body) {
  int j = 0;
  for (; j + kGroup <= n; j += kGroup) body(j, std::integral_constant<int, kGroup>());
  if (kGroup > kHalf && j < n) body(j, std::integral_constant<int, kHalf>());
}

// A byte a code to a stream and back. `n` is a multiple of 32; arrays of codes have room for a
// multiple of kGroup.
PYDIST_INLINE void pack_codes(const uint8_t* codes, int n, int bits, unsigned char* stream) {
  const CodeBits form = code_bits(bits);
  for_groups(n, [&](int j, auto count) {
    store_codes<decltype(count)::value>(form, wide_load(codes + j), stream + j / 8 * bits);
  });
}
PYDIST_INLINE void unpack_codes(const unsigned char* stream, int n, int bits, uint8_t* codes) {
  for_groups(n, [&](int j, auto count) {
    Vec v[kGroupVecs] = {};
    load_codes<decltype(count)::value>(stream + j / 8 * bits, bits, v);
    wide_store(codes + j, narrow_bytes(v));
  });
}

}  // namespace pydist::cpu::PYDIST_ISA
