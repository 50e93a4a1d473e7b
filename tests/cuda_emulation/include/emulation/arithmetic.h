// Integer and floating-point intrinsics, bit casts, cached loads: plain functions of their
// arguments.
#pragma once

#include <math.h>  // fabsf and the like without a namespace, as kernels call them

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "emulation/warp.h"

// ------------------------------------------------------------ bits

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
         __brev(static_cast<unsigned>(x >> 32));
}

// The high word of hi:lo << shift, the low word of hi:lo >> shift; shifts modulo 32, or clamped.
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned lo, unsigned hi, unsigned shift) {
  return shift >= 32 ? lo : __funnelshift_l(lo, hi, shift);
}
inline unsigned __funnelshift_rc(unsigned lo, unsigned hi, unsigned shift) {
  return shift >= 32 ? hi : __funnelshift_r(lo, hi, shift);
}

// Byte i of the result is byte (s >> 4 * i) & 7 of y:x; with bit 3 set, its sign everywhere.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = s >> (4 * i) & 0xF;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7))) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 uint128;
  return static_cast<unsigned long long>(static_cast<uint128>(a) * b >> 64);
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  }
  return sum;
}
inline unsigned __vabsdiffu4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 8) {
    const int difference = static_cast<int>(a >> i & 0xFF) - static_cast<int>(b >> i & 0xFF);
    result |= static_cast<unsigned>(difference < 0 ? -difference : difference) << i;
  }
  return result;
}

// ------------------------------------------------------------ casts

inline unsigned __float_as_uint(float x) {
  return emulation::from_bits<unsigned>(emulation::to_bits(x));
}
inline int __float_as_int(float x) { return emulation::from_bits<int>(emulation::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emulation::from_bits<float>(x); }
inline float __int_as_float(int x) { return emulation::from_bits<float>(emulation::to_bits(x)); }
inline long long __double_as_longlong(double x) {
  return emulation::from_bits<long long>(emulation::to_bits(x));
}
inline double __longlong_as_double(long long x) {
  return emulation::from_bits<double>(emulation::to_bits(x));
}
inline std::size_t __cvta_generic_to_global(const void* p) {
  return reinterpret_cast<std::size_t>(p);
}
inline std::size_t __cvta_generic_to_shared(const void* p) {
  return reinterpret_cast<std::size_t>(p);
}
inline void* __cvta_global_to_generic(std::size_t p) { return reinterpret_cast<void*>(p); }

// ------------------------------------------------------------ arithmetic, rounded to nearest even

// Sources are compiled with -ffp-contract=off, so a plain operation is the one rounded.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Rounded up: to nearest first, and then what that lacks, from a product and a sum without errors.
inline float __fmaf_ru(float a, float b, float c) {
  const float nearest = std::fma(a, b, c);
  const double product = static_cast<double>(a) * b;
  const double sum = product + c, part = sum - product;
  const double error = (product - (sum - part)) + (c - part);
  return (sum - nearest) + error > 0 ? std::nextafter(nearest, HUGE_VALF) : nearest;
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// ------------------------------------------------------------ conversions

namespace emulation {

// The device converts out-of-range values to the nearest integer and NaN to 0.
template <typename I>
I saturate(double x) {
  using Limits = std::numeric_limits<I>;
  if (std::isnan(x)) return 0;
  if (x <= static_cast<double>(Limits::min())) return Limits::min();
  return x >= static_cast<double>(Limits::max()) ? Limits::max() : static_cast<I>(x);
}

}  // namespace emulation

inline int __float2int_rn(float x) { return emulation::saturate<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emulation::saturate<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return emulation::saturate<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return emulation::saturate<int>(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) {
  return emulation::saturate<unsigned>(std::nearbyint(x));
}
inline unsigned __float2uint_rz(float x) { return emulation::saturate<unsigned>(std::trunc(x)); }
inline unsigned __float2uint_rd(float x) { return emulation::saturate<unsigned>(std::floor(x)); }
inline unsigned __float2uint_ru(float x) { return emulation::saturate<unsigned>(std::ceil(x)); }
inline long long __float2ll_rn(float x) {
  return emulation::saturate<long long>(std::nearbyint(x));
}
inline int __double2int_rn(double x) { return emulation::saturate<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// ------------------------------------------------------------ loads and stores with a cache hint

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldca(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stwt(T* p, T value) {
  *p = value;
}

// ------------------------------------------------------------ functions without a namespace

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
