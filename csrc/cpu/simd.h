// A few float32 lanes (Vec) and a few 64-bit lanes (Wide), three times: scalar, AVX2, AVX-512.
//
// Kernels are written once against this interface and compiled once for each instruction set, with
// PYDIST_ISA naming the namespace. Everything is internal to its translation unit (see layout.h).
#pragma once

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../wire/rounding.h"
#include "kernels.h"

namespace pydist::cpu::PYDIST_ISA {

// ---------------------------------------------------------------- AVX-512
#if defined(__AVX512F__)

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
PYDIST_INLINE Mask both(Mask a, Mask b) { return a & b; }
PYDIST_INLINE uint32_t bits_of(Mask m) { return m; }
PYDIST_INLINE Mask mask_from(uint32_t bits) { return static_cast<Mask>(bits); }
// |x| below the limit, decided on the bit pattern.
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

// 64-bit lanes: bits to be counted, or the products that Philox is made of (multiplication reads
// the low halves). wide_groups() says which Philox group each lane holds, such that store_groups()
// can write the low halves of the four counters group by group: kWideLanes groups of four words.
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
PYDIST_INLINE Wide wide_high(Wide x) { return _mm512_srli_epi64(x, 32); }
PYDIST_INLINE Wide wide_and(Wide a, Wide b) { return _mm512_and_si512(a, b); }
PYDIST_INLINE Wide wide_or(Wide a, Wide b) { return _mm512_or_si512(a, b); }
PYDIST_INLINE Wide wide_and_not(Wide a, Wide b) { return _mm512_andnot_si512(b, a); }
PYDIST_INLINE Wide wide_xor3(Wide a, Wide b, Wide c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
PYDIST_INLINE Wide wide_majority(Wide a, Wide b, Wide c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0xE8);
}
PYDIST_INLINE Wide wide_groups() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
PYDIST_INLINE void store_groups(uint32_t* p, Wide v0, Wide v1, Wide v2, Wide v3) {
  const Wide low = _mm512_mask_blend_epi32(0xAAAA, v0, _mm512_slli_epi64(v1, 32));
  const Wide high = _mm512_mask_blend_epi32(0xAAAA, v2, _mm512_slli_epi64(v3, 32));
  _mm512_storeu_si512(p, _mm512_unpacklo_epi64(low, high));
  _mm512_storeu_si512(p + 16, _mm512_unpackhi_epi64(low, high));
}

// ---------------------------------------------------------------- AVX2
#elif defined(__AVX2__)

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
PYDIST_INLINE Wide wide_high(Wide x) { return _mm256_srli_epi64(x, 32); }
PYDIST_INLINE Wide wide_and(Wide a, Wide b) { return _mm256_and_si256(a, b); }
PYDIST_INLINE Wide wide_or(Wide a, Wide b) { return _mm256_or_si256(a, b); }
PYDIST_INLINE Wide wide_and_not(Wide a, Wide b) { return _mm256_andnot_si256(b, a); }
PYDIST_INLINE Wide wide_xor3(Wide a, Wide b, Wide c) { return wide_xor(wide_xor(a, b), c); }
PYDIST_INLINE Wide wide_majority(Wide a, Wide b, Wide c) {
  return wide_or(wide_and(a, b), wide_and(c, wide_or(a, b)));
}
PYDIST_INLINE Wide wide_groups() { return _mm256_setr_epi64x(0, 2, 1, 3); }
PYDIST_INLINE void store_groups(uint32_t* p, Wide v0, Wide v1, Wide v2, Wide v3) {
  const Wide low = _mm256_blend_epi32(v0, _mm256_slli_epi64(v1, 32), 0xAA);
  const Wide high = _mm256_blend_epi32(v2, _mm256_slli_epi64(v3, 32), 0xAA);
  wide_store(p, _mm256_unpacklo_epi64(low, high));
  wide_store(p + 8, _mm256_unpackhi_epi64(low, high));
}

// ---------------------------------------------------------------- scalar
#else

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
PYDIST_INLINE Wide wide_majority(Wide a, Wide b, Wide c) { return (a & b) | (c & (a | b)); }
PYDIST_INLINE Wide wide_groups() { return 0; }
PYDIST_INLINE void store_groups(uint32_t* p, Wide v0, Wide v1, Wide v2, Wide v3) {
  p[0] = static_cast<uint32_t>(v0);
  p[1] = static_cast<uint32_t>(v1);
  p[2] = static_cast<uint32_t>(v2);
  p[3] = static_cast<uint32_t>(v3);
}

#endif

// ---------------------------------------------------------------- the same for all

constexpr uint32_t kLaneMask = kLanes == 32 ? 0xFFFFFFFFu : (1u << kLanes) - 1u;

// Float32 output that nobody reads soon goes past the caches (`stream`, which wants whole aligned
// vectors and no NaN): the memory it overwrites is then not read first.
PYDIST_INLINE bool can_stream(const float* p, int64_t n) {
  constexpr int64_t kLarge = 1 << 17;  // half a MiB in one piece; smaller ones are read back soon
  return n >= kLarge && reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0;
}
template <typename T>
PYDIST_INLINE bool can_stream(const T*, int64_t) {
  return false;
}
template <typename T>
PYDIST_INLINE void stream(T* p, Vec x) {
  store(p, x);
}

// Brings in the cache line that a loop reaches kAhead bytes later. The processor's own prefetcher
// stops at the end of every 4 KiB page; asking across it keeps memory busy.
constexpr int kAhead = 2048;
PYDIST_INLINE void prefetch(const void* p, int ahead = kAhead) {
  __builtin_prefetch(static_cast<const char*>(p) + ahead);
}
template <typename T>
PYDIST_INLINE void prefetch_word(const T* x) {  // the lines of kWordBits elements
  for (size_t b = 0; b < kWordBits * sizeof(T); b += 64) {
    prefetch(reinterpret_cast<const char*>(x) + b);
  }
}

// Payloads are little-endian and need not be aligned.
PYDIST_INLINE uint32_t load_word(const unsigned char* p) {
  uint32_t w;
  std::memcpy(&w, p, 4);
  return w;
}
PYDIST_INLINE void store_word(unsigned char* p, uint32_t w) { std::memcpy(p, &w, 4); }

}  // namespace pydist::cpu::PYDIST_ISA
