// The vectors of simd.h for NEON, which every AArch64 has: four floats, two 64-bit lanes.
#pragma once

#include <arm_neon.h>

#include "../../wire/rounding.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kLanes = 4;
using Vec = float32x4_t;
using Mask = uint32x4_t;  // all bits of a lane, or none

PYDIST_INLINE Vec set1(float x) { return vdupq_n_f32(x); }
PYDIST_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
PYDIST_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
PYDIST_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
PYDIST_INLINE Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
PYDIST_INLINE Mask greater(Vec a, Vec b) { return vcgtq_f32(a, b); }
PYDIST_INLINE Mask greater_equal(Vec a, Vec b) { return vcgeq_f32(a, b); }
PYDIST_INLINE Vec select(Mask m, Vec yes, Vec no) { return vbslq_f32(m, yes, no); }
PYDIST_INLINE Vec min(Vec a, Vec b) { return vminq_f32(a, b); }
PYDIST_INLINE Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
PYDIST_INLINE Vec max_bits(Vec a, Vec b) {
  return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}
PYDIST_INLINE uint32_t top_bits(Vec x) { return vmaxvq_u32(vreinterpretq_u32_f32(x)); }
PYDIST_INLINE Vec abs(Vec x) { return vabsq_f32(x); }
PYDIST_INLINE Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
// There is no instruction for either: each lane keeps, or is tested for, the bit of its place.
PYDIST_INLINE uint32x4_t lane_bits() { return uint32x4_t{1, 2, 4, 8}; }
PYDIST_INLINE uint32_t bits_of(Mask m) { return vaddvq_u32(vandq_u32(m, lane_bits())); }
PYDIST_INLINE Mask mask_from(uint32_t bits) { return vtstq_u32(vdupq_n_u32(bits), lane_bits()); }
PYDIST_INLINE Mask abs_below(Vec x, uint32_t limit) {
  const uint32x4_t a = vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(kAbsMask));
  return vcltq_u32(a, vdupq_n_u32(limit));
}

// As bytes: a pointer to floats would promise the compiler an alignment that arrays need not have.
PYDIST_INLINE uint8x16_t load16(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
PYDIST_INLINE uint8x8_t load8(const void* p) { return vld1_u8(static_cast<const uint8_t*>(p)); }
PYDIST_INLINE void store16(void* p, uint8x16_t x) { vst1q_u8(static_cast<uint8_t*>(p), x); }
PYDIST_INLINE void store8(void* p, uint16x4_t x) {
  vst1_u8(static_cast<uint8_t*>(p), vreinterpret_u8_u16(x));
}

PYDIST_INLINE Vec load(const float* p) { return vreinterpretq_f32_u8(load16(p)); }
PYDIST_INLINE Vec load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u8(load8(p))); }
PYDIST_INLINE Vec load(const BFloat* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(load8(p)), 16));
}
PYDIST_INLINE Mask is_nan(Vec x) { return vmvnq_u32(vceqq_f32(x, x)); }
PYDIST_INLINE void stream(float* p, Vec x) { store16(p, vreinterpretq_u8_f32(x)); }
PYDIST_INLINE void stream_end() {}
PYDIST_INLINE void store(float* p, Vec x) {
  stream(p, vbslq_f32(is_nan(x), vreinterpretq_f32_u32(vdupq_n_u32(kNanBits)), x));
}
PYDIST_INLINE void store(Half* p, Vec x) {
  const uint16x4_t h = vreinterpret_u16_f16(vcvt_f16_f32(x));
  store8(p, vbsl_u16(vmovn_u32(is_nan(x)), vdup_n_u16(0x7E00), h));
}
PYDIST_INLINE void store(BFloat* p, Vec x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  store8(p, vshrn_n_u32(vbslq_u32(is_nan(x), vdupq_n_u32(kNanBits), r), 16));
}

PYDIST_INLINE Vec from_integers(Vec x) { return vcvtq_f32_u32(vreinterpretq_u32_f32(x)); }
PYDIST_INLINE Vec load_bytes(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
PYDIST_INLINE Vec load_half_bits(const uint16_t* p) {
  return vreinterpretq_f32_u32(vmovl_u16(vreinterpret_u16_u8(load8(p))));
}
PYDIST_INLINE Vec add_bits(Vec a, Vec b) {
  return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}
PYDIST_INLINE Vec sub_bits(Vec a, Vec b) {
  return vreinterpretq_f32_u32(vsubq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}
PYDIST_INLINE Mask sign_bit(Vec x) { return vcltzq_s32(vreinterpretq_s32_f32(x)); }
PYDIST_INLINE Vec ceil_bits(Vec x) {
  return add(vrndpq_f32(mul(x, set1(65536.0f))), set1(8388608.0f));
}
PYDIST_INLINE void store_low_bytes(uint8_t* p, Vec x) {
  const uint16x4_t low = vmovn_u32(vreinterpretq_u32_f32(x));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(low, low));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  std::memcpy(p, &four, 4);
}

PYDIST_INLINE int store_places(uint32_t* p, uint32_t lanes, uint32_t base) {
  return store_places_one_by_one(p, lanes, base);
}

constexpr int kWideLanes = 2;
using Wide = uint64x2_t;
PYDIST_INLINE Wide wide_load(const void* p) { return vreinterpretq_u64_u8(load16(p)); }
PYDIST_INLINE void wide_store(void* p, Wide x) { store16(p, vreinterpretq_u8_u64(x)); }
PYDIST_INLINE void wide_stream(void* p, Wide x) { wide_store(p, x); }
PYDIST_INLINE Wide wide_set1(uint64_t x) { return vdupq_n_u64(x); }
PYDIST_INLINE Wide wide_mul32(Wide a, Wide b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
PYDIST_INLINE Wide wide_xor(Wide a, Wide b) { return veorq_u64(a, b); }
PYDIST_INLINE Wide wide_add(Wide a, Wide b) { return vaddq_u64(a, b); }
PYDIST_INLINE Wide wide_high(Wide x) { return vshrq_n_u64(x, 32); }
PYDIST_INLINE Wide wide_and(Wide a, Wide b) { return vandq_u64(a, b); }
PYDIST_INLINE Wide wide_or(Wide a, Wide b) { return vorrq_u64(a, b); }
PYDIST_INLINE Wide wide_and_not(Wide a, Wide b) { return vbicq_u64(a, b); }
PYDIST_INLINE Wide wide_xor3(Wide a, Wide b, Wide c) { return veorq_u64(veorq_u64(a, b), c); }
// Where a and b differ c decides; elsewhere both are the majority.
PYDIST_INLINE Wide wide_majority(Wide a, Wide b, Wide c) {
  return vbslq_u64(veorq_u64(a, b), c, a);
}
PYDIST_INLINE Wide wide_shift_left(Wide x, int n) { return vshlq_u64(x, vdupq_n_s64(n)); }
PYDIST_INLINE Wide wide_shift_right(Wide x, int n) { return vshlq_u64(x, vdupq_n_s64(-n)); }
PYDIST_INLINE uint16x8_t half_lane_bits() { return uint16x8_t{1, 2, 4, 8, 16, 32, 64, 128}; }
PYDIST_INLINE Wide choose(uint32_t bits, uint32_t yes, uint32_t no) {
  return vreinterpretq_u64_u32(vbslq_u32(mask_from(bits), vdupq_n_u32(yes), vdupq_n_u32(no)));
}
PYDIST_INLINE Wide choose(uint32_t bits, uint16_t yes, uint16_t no) {
  const uint16x8_t chosen = vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits)), half_lane_bits());
  return vreinterpretq_u64_u16(vbslq_u16(chosen, vdupq_n_u16(yes), vdupq_n_u16(no)));
}
PYDIST_INLINE uint32_t halves_below(const void* p, uint16_t from, uint16_t limit) {
  uint32_t bits = 0;
  for (int k = 0; k < 4; ++k) {
    const uint16x8_t x = vreinterpretq_u16_u8(load16(static_cast<const uint8_t*>(p) + 16 * k));
    const uint16x8_t below = vcltq_u16(vsubq_u16(x, vdupq_n_u16(from)), vdupq_n_u16(limit));
    bits |= static_cast<uint32_t>(vaddvq_u16(vandq_u16(below, half_lane_bits()))) << (8 * k);
  }
  return bits;
}

template <int kByte = 0>
PYDIST_INLINE Wide narrow_bytes(const Vec* v) {
  const auto halves = [](Vec x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    return vmovn_u32(kByte ? vshlq_u32(bits, vdupq_n_s32(-8 * kByte)) : bits);
  };
  const uint8x8_t low = vmovn_u16(vcombine_u16(halves(v[0]), halves(v[1])));
  const uint8x8_t high = vmovn_u16(vcombine_u16(halves(v[2]), halves(v[3])));
  return vreinterpretq_u64_u8(vcombine_u8(low, high));
}

template <int kCodes>
PYDIST_INLINE void load_codes(const unsigned char* p, int bits, Vec* v) {
  static_assert(kCodes == 16, "whole vectors");
  const uint32x4_t low = vdupq_n_u32((1u << bits) - 1u);
  for (int k = 0; k < 4; ++k) {  // eight codes are a field of `bits` bytes, four are half of it
    const uint64_t field = load_field(p + k / 2 * bits, bits) >> (k % 2 * 4 * bits);
    const uint64x2_t first = vshlq_u64(vdupq_n_u64(field), int64x2_t{0, -bits});
    const uint64x2_t second = vshlq_u64(vdupq_n_u64(field), int64x2_t{-2 * bits, -3 * bits});
    v[k] = vreinterpretq_f32_u32(vandq_u32(vcombine_u32(vmovn_u64(first), vmovn_u64(second)), low));
  }
}
template <int kFields>
PYDIST_INLINE void store_fields(unsigned char* p, Wide x, int bits) {
  static_assert(kFields == 2, "all lanes");
  store_field(p, vgetq_lane_u64(x, 0), bits);
  store_field(p + bits, vgetq_lane_u64(x, 1), bits);
}

PYDIST_INLINE Wide wide_groups() { return uint64x2_t{0, 1}; }
PYDIST_INLINE void store_groups(uint32_t* p, Wide v0, Wide v1, Wide v2, Wide v3) {
  const Wide low = vsliq_n_u64(v0, v1, 32);  // the low halves of v1 above those of v0
  const Wide high = vsliq_n_u64(v2, v3, 32);
  wide_store(p, vzip1q_u64(low, high));
  wide_store(p + 4, vzip2q_u64(low, high));
}

}  // namespace pydist::cpu::PYDIST_ISA
