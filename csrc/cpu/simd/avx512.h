// The vectors of simd.h for AVX-512: sixteen floats, eight 64-bit lanes.
#pragma once

#include <immintrin.h>

#include "../../wire/rounding.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kLanes = 16;
using Vec = __m512;
using Mask = __mmask16;

PYDIST_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
PYDIST_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
PYDIST_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
PYDIST_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
PYDIST_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
PYDIST_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
PYDIST_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
PYDIST_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
PYDIST_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
PYDIST_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PYDIST_INLINE Vec max_bits(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
PYDIST_INLINE uint32_t top_bits(Vec x) { return _mm512_reduce_max_epu32(_mm512_castps_si512(x)); }
PYDIST_INLINE Vec abs(Vec x) { return _mm512_abs_ps(x); }
PYDIST_INLINE Mask both(Mask a, Mask b) { return a & b; }
PYDIST_INLINE uint32_t bits_of(Mask m) { return m; }
PYDIST_INLINE Mask mask_from(uint32_t bits) { return static_cast<Mask>(bits); }
PYDIST_INLINE Mask abs_below(Vec x, uint32_t limit) {
  const __m512i a = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(kAbsMask));
  return _mm512_cmplt_epu32_mask(a, _mm512_set1_epi32(static_cast<int>(limit)));
}

PYDIST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
PYDIST_INLINE Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PYDIST_INLINE Vec load(const BFloat* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
PYDIST_INLINE Mask is_nan(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
PYDIST_INLINE void store(float* p, Vec x) {
  _mm512_storeu_ps(p, select(is_nan(x), _mm512_castsi512_ps(_mm512_set1_epi32(kNanBits)), x));
}
PYDIST_INLINE void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
PYDIST_INLINE void stream_end() { _mm_sfence(); }
PYDIST_INLINE void store(Half* p, Vec x) {
  const __m256i h = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_mask_mov_epi16(h, is_nan(x), _mm256_set1_epi16(0x7E00)));
}
PYDIST_INLINE void store(BFloat* p, Vec x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i q =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(r, 16), is_nan(x), _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(q));
}

PYDIST_INLINE Vec from_integers(Vec x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }
PYDIST_INLINE Vec load_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
PYDIST_INLINE Vec load_half_bits(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
PYDIST_INLINE Vec add_bits(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
PYDIST_INLINE Vec sub_bits(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
PYDIST_INLINE Mask sign_bit(Vec x) { return _mm512_movepi32_mask(_mm512_castps_si512(x)); }
// From 128 on the last bit of a float is worth 2^-16.
PYDIST_INLINE Vec ceil_bits(Vec x) {
  return _mm512_add_round_ps(x, set1(128.0f), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}
PYDIST_INLINE void store_low_bytes(uint8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(x)));
}

PYDIST_INLINE int store_places(uint32_t* p, uint32_t lanes, uint32_t base) {
  const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_add_epi32(numbers, _mm512_set1_epi32(static_cast<int>(base)));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<Mask>(lanes), places));
  return __builtin_popcount(lanes);
}

constexpr int kWideLanes = 8;
using Wide = __m512i;
PYDIST_INLINE Wide wide_load(const void* p) { return _mm512_loadu_si512(p); }
PYDIST_INLINE void wide_store(void* p, Wide x) { _mm512_storeu_si512(p, x); }
PYDIST_INLINE void wide_stream(void* p, Wide x) {
  _mm512_stream_si512(static_cast<__m512i*>(p), x);
}
PYDIST_INLINE Wide wide_set1(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
PYDIST_INLINE Wide wide_mul32(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
PYDIST_INLINE Wide wide_xor(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
PYDIST_INLINE Wide wide_add(Wide a, Wide b) { return _mm512_add_epi64(a, b); }
PYDIST_INLINE Wide wide_high(Wide x) {
  return _mm512_shuffle_epi32(x, static_cast<_MM_PERM_ENUM>(0xF5));
}
PYDIST_INLINE Wide wide_and(Wide a, Wide b) { return _mm512_and_si512(a, b); }
PYDIST_INLINE Wide wide_or(Wide a, Wide b) { return _mm512_or_si512(a, b); }
PYDIST_INLINE Wide wide_and_not(Wide a, Wide b) { return _mm512_andnot_si512(b, a); }
PYDIST_INLINE Wide wide_xor3(Wide a, Wide b, Wide c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
PYDIST_INLINE Wide wide_majority(Wide a, Wide b, Wide c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0xE8);
}
PYDIST_INLINE Wide wide_shift_left(Wide x, int n) {
  return _mm512_sll_epi64(x, _mm_cvtsi32_si128(n));
}
PYDIST_INLINE Wide wide_shift_right(Wide x, int n) {
  return _mm512_srl_epi64(x, _mm_cvtsi32_si128(n));
}
PYDIST_INLINE Wide choose(uint32_t bits, uint32_t yes, uint32_t no) {
  return _mm512_mask_blend_epi32(static_cast<__mmask16>(bits),
                                 _mm512_set1_epi32(static_cast<int>(no)),
                                 _mm512_set1_epi32(static_cast<int>(yes)));
}
PYDIST_INLINE Wide choose(uint32_t bits, uint16_t yes, uint16_t no) {
  return _mm512_mask_blend_epi16(bits, _mm512_set1_epi16(static_cast<int16_t>(no)),
                                 _mm512_set1_epi16(static_cast<int16_t>(yes)));
}
PYDIST_INLINE uint32_t halves_below(const void* p, uint16_t from, uint16_t limit) {
  const __m512i x = _mm512_sub_epi16(wide_load(p), _mm512_set1_epi16(static_cast<int16_t>(from)));
  return _mm512_cmplt_epu16_mask(x, _mm512_set1_epi16(static_cast<int16_t>(limit)));
}

// Each Vec's bytes to a word of every quarter of the lanes; then the quarters of each together.
template <int kByte = 0>
PYDIST_INLINE Wide narrow_bytes(const Vec* v) {
  const __m512i from = _mm512_set1_epi32(0x0C080400 + 0x01010101 * kByte);
  const auto bytes = [&](int k) { return _mm512_castps_si512(v[k]); };
  __m512i mixed = _mm512_shuffle_epi8(bytes(0), from);
  mixed = _mm512_mask_shuffle_epi8(mixed, 0x00F000F000F000F0u, bytes(1), from);
  mixed = _mm512_mask_shuffle_epi8(mixed, 0x0F000F000F000F00u, bytes(2), from);
  mixed = _mm512_mask_shuffle_epi8(mixed, 0xF000F000F000F000u, bytes(3), from);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, mixed);
}

// A code lies in the two pairs of bytes from pair i * bits / 16 on.
struct CodeMoves {
  alignas(64) uint16_t from[8][32];
  alignas(64) uint32_t shift[8][16];
};
constexpr CodeMoves code_moves() {
  CodeMoves moves{};
  for (int bits = 1; bits < 8; ++bits) {
    for (int i = 0; i < 16; ++i) {
      moves.from[bits][2 * i] = static_cast<uint16_t>(i * bits / 16);
      moves.from[bits][2 * i + 1] = static_cast<uint16_t>(i * bits / 16 + 1);
      moves.shift[bits][i] = static_cast<uint32_t>(i * bits % 16);
    }
  }
  return moves;
}
constexpr CodeMoves kCodeMoves = code_moves();

template <int kCodes>
PYDIST_INLINE void load_codes(const unsigned char* p, int bits, Vec* v) {
  const auto words = static_cast<__mmask16>((1u << (kCodes * bits / 32)) - 1u);
  const __m512i stream = _mm512_maskz_loadu_epi32(words, p);
  const __m512i from = _mm512_load_si512(kCodeMoves.from[bits]);
  const __m512i shift = _mm512_load_si512(kCodeMoves.shift[bits]);
  const __m512i low = _mm512_set1_epi32((1 << bits) - 1);
  for (int k = 0; k < kCodes / kLanes; ++k) {
    const __m512i here = _mm512_add_epi16(from, _mm512_set1_epi16(static_cast<int16_t>(k * bits)));
    const __m512i pairs = _mm512_permutexvar_epi16(here, stream);
    v[k] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_srlv_epi32(pairs, shift), low));
  }
}

// Bytes move in pairs, since single ones can't cross lanes without more than AVX-512BW: a field
// that begins at an odd byte is taken from the byte before, and shifted.
struct FieldMoves {
  alignas(64) uint16_t first[9][32];   // pair of the lanes -> pair of the stream that holds its
                                       // lower byte
  alignas(64) uint16_t second[9][32];  // and its upper byte, where that is of the next lane
  alignas(64) uint64_t shift[9][8];
  uint32_t divided[9];  // pairs of which that is so
};
constexpr FieldMoves field_moves() {
  FieldMoves moves{};
  for (int bits = 1; bits <= 8; ++bits) {
    for (int lane = 0; lane < 8; ++lane) {
      moves.shift[bits][lane] = 8 * (lane * bits % 2);
    }
    for (int pair = 0; pair < 4 * bits; ++pair) {
      const int lane = 2 * pair / bits, next = (2 * pair + 1) / bits;
      moves.first[bits][pair] = static_cast<uint16_t>(4 * lane + pair - lane * bits / 2);
      moves.second[bits][pair] = static_cast<uint16_t>(4 * next + pair - next * bits / 2);
      if (next != lane) moves.divided[bits] |= 1u << pair;
    }
  }
  return moves;
}
constexpr FieldMoves kFieldMoves = field_moves();

// The first 8 * bits bytes: a half, a quarter, an eighth. Stores under a mask are slower.
PYDIST_INLINE void store_eighths(unsigned char* p, __m512i x, int bits) {
  __m256i half = _mm512_castsi512_si256(x);
  if (bits & 4) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    half = _mm512_extracti64x4_epi64(x, 1);
    p += 32;
  }
  __m128i quarter = _mm256_castsi256_si128(half);
  if (bits & 2) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), quarter);
    quarter = _mm256_extracti128_si256(half, 1);
    p += 16;
  }
  if (bits & 1) _mm_storel_epi64(reinterpret_cast<__m128i*>(p), quarter);
}

template <int kFields>
PYDIST_INLINE void store_fields(unsigned char* p, Wide x, int bits) {
  const __m512i pairs = _mm512_sllv_epi64(x, _mm512_load_si512(kFieldMoves.shift[bits]));
  const __m512i first = _mm512_permutexvar_epi16(_mm512_load_si512(kFieldMoves.first[bits]), pairs);
  const __m512i second = _mm512_maskz_permutexvar_epi16(
      kFieldMoves.divided[bits], _mm512_load_si512(kFieldMoves.second[bits]), pairs);
  const __m512i stream = _mm512_or_si512(first, second);
  if (kFields == 8 && bits < 8) return store_eighths(p, stream, bits);
  const auto words = static_cast<__mmask16>((1u << (kFields * bits / 4)) - 1u);
  _mm512_mask_storeu_epi32(p, words, stream);
}

PYDIST_INLINE Wide wide_groups() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
PYDIST_INLINE void store_groups(uint32_t* p, Wide v0, Wide v1, Wide v2, Wide v3) {
  const Wide low = _mm512_mask_blend_epi32(0xAAAA, v0, _mm512_slli_epi64(v1, 32));
  const Wide high = _mm512_mask_blend_epi32(0xAAAA, v2, _mm512_slli_epi64(v3, 32));
  _mm512_storeu_si512(p, _mm512_unpacklo_epi64(low, high));
  _mm512_storeu_si512(p + 16, _mm512_unpackhi_epi64(low, high));
}

}  // namespace pydist::cpu::PYDIST_ISA
