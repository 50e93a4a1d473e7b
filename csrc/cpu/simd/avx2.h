// The vectors of simd.h for AVX2: eight floats, four 64-bit lanes.
#pragma once

#include <immintrin.h>

#include "../../wire/rounding.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kLanes = 8;
using Vec = __m256;
using Mask = __m256;

PYDIST_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
PYDIST_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
PYDIST_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
PYDIST_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
PYDIST_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
PYDIST_INLINE Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
PYDIST_INLINE Mask greater_equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
PYDIST_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, m); }
PYDIST_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
PYDIST_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PYDIST_INLINE Vec max_bits(Vec a, Vec b) {
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
PYDIST_INLINE uint32_t top_bits(Vec x) {
  const __m256i u = _mm256_castps_si256(x);
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
PYDIST_INLINE Vec abs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
PYDIST_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
PYDIST_INLINE uint32_t bits_of(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
PYDIST_INLINE Mask mask_from(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i spread = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(spread, lane));
}
PYDIST_INLINE Mask abs_below(Vec x, uint32_t limit) {
  // Both sides are below 2^31, so the signed comparison is the unsigned one.
  const __m256i a = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(kAbsMask));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(limit)), a));
}

PYDIST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
PYDIST_INLINE Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PYDIST_INLINE Vec load(const BFloat* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
PYDIST_INLINE Mask is_nan(Vec x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
// Low 16 bits of each 32-bit lane, in order.
PYDIST_INLINE __m128i narrow(__m256i x) {
  const __m256i packed = _mm256_packus_epi32(x, x);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
PYDIST_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, select(is_nan(x), _mm256_castsi256_ps(_mm256_set1_epi32(kNanBits)), x));
}
PYDIST_INLINE void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
PYDIST_INLINE void stream_end() { _mm_sfence(); }
PYDIST_INLINE void store(Half* p, Vec x) {
  const __m128i h = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i nan = narrow(_mm256_srli_epi32(_mm256_castps_si256(is_nan(x)), 16));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_blendv_epi8(h, _mm_set1_epi16(0x7E00), nan));
}
PYDIST_INLINE void store(BFloat* p, Vec x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i q = _mm256_blendv_epi8(_mm256_srli_epi32(r, 16), _mm256_set1_epi32(0x7FC0),
                                       _mm256_castps_si256(is_nan(x)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(q));
}

PYDIST_INLINE Vec from_integers(Vec x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }
PYDIST_INLINE Vec load_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
PYDIST_INLINE Vec load_half_bits(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
PYDIST_INLINE Vec add_bits(Vec a, Vec b) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
PYDIST_INLINE Vec sub_bits(Vec a, Vec b) {
  return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
PYDIST_INLINE Mask sign_bit(Vec x) { return x; }  // all that select looks at
PYDIST_INLINE Vec ceil_bits(Vec x) {
  return add(_mm256_ceil_ps(mul(x, set1(65536.0f))), set1(8388608.0f));
}
PYDIST_INLINE void store_low_bytes(uint8_t* p, Vec x) {
  const __m128i low = narrow(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0xFF)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, low));
}

PYDIST_INLINE int store_places(uint32_t* p, uint32_t lanes, uint32_t base) {
  return store_places_one_by_one(p, lanes, base);
}

constexpr int kWideLanes = 4;
using Wide = __m256i;
PYDIST_INLINE Wide wide_load(const void* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
PYDIST_INLINE void wide_store(void* p, Wide x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}
PYDIST_INLINE void wide_stream(void* p, Wide x) {
  _mm256_stream_si256(static_cast<__m256i*>(p), x);
}
PYDIST_INLINE Wide wide_set1(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
PYDIST_INLINE Wide wide_mul32(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
PYDIST_INLINE Wide wide_xor(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
PYDIST_INLINE Wide wide_add(Wide a, Wide b) { return _mm256_add_epi64(a, b); }
PYDIST_INLINE Wide wide_high(Wide x) { return _mm256_shuffle_epi32(x, 0xF5); }
PYDIST_INLINE Wide wide_and(Wide a, Wide b) { return _mm256_and_si256(a, b); }
PYDIST_INLINE Wide wide_or(Wide a, Wide b) { return _mm256_or_si256(a, b); }
PYDIST_INLINE Wide wide_and_not(Wide a, Wide b) { return _mm256_andnot_si256(b, a); }
PYDIST_INLINE Wide wide_xor3(Wide a, Wide b, Wide c) { return wide_xor(wide_xor(a, b), c); }
PYDIST_INLINE Wide wide_majority(Wide a, Wide b, Wide c) {
  return wide_or(wide_and(a, b), wide_and(c, wide_xor(a, b)));
}
PYDIST_INLINE Wide wide_shift_left(Wide x, int n) {
  return _mm256_sll_epi64(x, _mm_cvtsi32_si128(n));
}
PYDIST_INLINE Wide wide_shift_right(Wide x, int n) {
  return _mm256_srl_epi64(x, _mm_cvtsi32_si128(n));
}
PYDIST_INLINE Wide choose(uint32_t bits, uint32_t yes, uint32_t no) {
  return _mm256_blendv_epi8(_mm256_set1_epi32(static_cast<int>(no)),
                            _mm256_set1_epi32(static_cast<int>(yes)),
                            _mm256_castps_si256(mask_from(bits)));
}
PYDIST_INLINE Wide choose(uint32_t bits, uint16_t yes, uint16_t no) {
  const __m256i lane = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                         8192, 16384, -32768);
  const __m256i spread = _mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits)), lane);
  return _mm256_blendv_epi8(_mm256_set1_epi16(static_cast<int16_t>(no)),
                            _mm256_set1_epi16(static_cast<int16_t>(yes)),
                            _mm256_cmpeq_epi16(spread, lane));
}
PYDIST_INLINE uint32_t halves_below(const void* p, uint16_t from, uint16_t limit) {
  const auto not_below = [&](int half) {
    const __m256i x = _mm256_sub_epi16(wide_load(static_cast<const __m256i*>(p) + half),
                                       _mm256_set1_epi16(static_cast<int16_t>(from)));
    const __m256i most = _mm256_max_epu16(x, _mm256_set1_epi16(static_cast<int16_t>(limit)));
    return _mm256_cmpeq_epi16(most, x);
  };
  const __m256i bytes = _mm256_packs_epi16(not_below(0), not_below(1));
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
}

template <int kByte = 0>
PYDIST_INLINE Wide narrow_bytes(const Vec* v) {
  const __m256i low = _mm256_set1_epi32(0xFF);
  const auto bytes = [&](Vec x) {
    return _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(x), 8 * kByte), low);
  };
  // Four bytes of each of the four in turn, half of the lanes at a time.
  const __m256i mixed = _mm256_packus_epi16(_mm256_packus_epi32(bytes(v[0]), bytes(v[1])),
                                            _mm256_packus_epi32(bytes(v[2]), bytes(v[3])));
  return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// A code lies in the two bytes from byte i * bits / 8 on. Words bring the bytes of eight codes into
// both halves, bytes then into the lanes.
struct CodeMoves {
  alignas(32) uint8_t part[8][32];  // 128: none
  alignas(32) uint32_t shift[8][8];
  alignas(32) uint32_t words[9][8];  // words of the stream of 32 codes; all bits or none
};
constexpr CodeMoves code_moves() {
  CodeMoves moves{};
  for (int bits = 1; bits <= 8; ++bits) {
    for (int i = 0; i < 8; ++i) {
      moves.words[bits][i] = i < bits ? ~0u : 0u;
      if (bits == 8) continue;
      moves.shift[bits][i] = static_cast<uint32_t>(i * bits % 8);
      for (int b = 0; b < 4; ++b) {
        moves.part[bits][4 * i + b] = static_cast<uint8_t>(b < 2 ? i * bits / 8 + b : 128);
      }
    }
  }
  return moves;
}
constexpr CodeMoves kCodeMoves = code_moves();

template <int kCodes>
PYDIST_INLINE void load_codes(const unsigned char* p, int bits, Vec* v) {
  static_assert(kCodes == 32, "whole vectors");
  const __m256i stream =
      _mm256_maskload_epi32(reinterpret_cast<const int*>(p), wide_load(kCodeMoves.words[bits]));
  const __m256i part = wide_load(kCodeMoves.part[bits]), shift = wide_load(kCodeMoves.shift[bits]);
  const __m256i low = _mm256_set1_epi32((1 << bits) - 1);
  for (int k = 0; k < 4; ++k) {
    const int word = k * bits / 4, byte = k * bits % 4;
    const __m256i words =
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3), _mm256_set1_epi32(word));
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(stream, words),
                            _mm256_add_epi8(part, _mm256_set1_epi8(static_cast<char>(byte))));
    v[k] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_srlv_epi32(bytes, shift), low));
  }
}

// The stream of four fields is `bits` words. Its upper two fields begin at byte 2 * bits, in word
// bits / 2: bytes move together within a half, words then to their places.
struct FieldMoves {
  alignas(32) uint8_t join[9][32];    // byte of the lanes -> of a half; 128: none
  alignas(32) uint32_t second[9][8];  // word of the halves -> of the stream
  alignas(32) uint32_t has_first[9][8],
      has_second[9][8];  // which words either has: all bits or none
};
constexpr FieldMoves field_moves() {
  FieldMoves moves{};
  for (int bits = 1; bits <= 8; ++bits) {
    const int begin = bits / 2, odd = 2 * (bits % 2);  // where the upper half's stream begins
    for (int w = 0; w < 8; ++w) {
      const int upper = w - begin;
      moves.second[bits][w] = static_cast<uint32_t>(4 + (upper & 3));
      moves.has_first[bits][w] = w < 4 ? ~0u : 0u;
      moves.has_second[bits][w] = upper >= 0 && upper < 4 ? ~0u : 0u;
    }
    for (int b = 0; b < 32; ++b) moves.join[bits][b] = 128;
    for (int half = 0; half < 2; ++half) {
      for (int b = 0; b < 2 * bits; ++b) {
        moves.join[bits][16 * half + b + half * odd] =
            static_cast<uint8_t>(b / bits * 8 + b % bits);
      }
    }
  }
  return moves;
}
constexpr FieldMoves kFieldMoves = field_moves();

template <int kFields>
PYDIST_INLINE void store_fields(unsigned char* p, Wide x, int bits) {
  static_assert(kFields == 4, "all lanes");
  const __m256i halves = _mm256_shuffle_epi8(x, wide_load(kFieldMoves.join[bits]));
  const __m256i first = _mm256_and_si256(halves, wide_load(kFieldMoves.has_first[bits]));
  const __m256i second =
      _mm256_and_si256(_mm256_permutevar8x32_epi32(halves, wide_load(kFieldMoves.second[bits])),
                       wide_load(kFieldMoves.has_second[bits]));
  _mm256_maskstore_epi32(reinterpret_cast<int*>(p), wide_load(kCodeMoves.words[bits]),
                         _mm256_or_si256(first, second));
}

PYDIST_INLINE Wide wide_groups() { return _mm256_setr_epi64x(0, 2, 1, 3); }
PYDIST_INLINE void store_groups(uint32_t* p, Wide v0, Wide v1, Wide v2, Wide v3) {
  const Wide low = _mm256_blend_epi32(v0, _mm256_slli_epi64(v1, 32), 0xAA);
  const Wide high = _mm256_blend_epi32(v2, _mm256_slli_epi64(v3, 32), 0xAA);
  wide_store(p, _mm256_unpacklo_epi64(low, high));
  wide_store(p + 8, _mm256_unpackhi_epi64(low, high));
}

}  // namespace pydist::cpu::PYDIST_ISA
