// Values of any type as float32 and back, and residuals; what the kernels of codecs share.
#pragma once

#include "simd.h"

namespace pydist::cpu::PYDIST_ISA {

// x as float32: where it is, if that is what it is; else in `room`.
PYDIST_INLINE const float* widened(const float* x, int, float*) { return x; }

template <typename T>
PYDIST_INLINE const float* widened(const T* x, int n, float* room) {
  int i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    walks_word(x + i);
    for (int j = 0; j < kWordBits; j += kLanes) store(room + i + j, load(x + i + j));
  }
  for (; i < n; ++i) {
    T one;
    std::memcpy(&one, x + i, sizeof(T));
    room[i] = to_float(one);
  }
  return room;
}

// Stores n floats as T; past the caches where `streams` (whole vectors only).
template <typename T>
PYDIST_INLINE void narrowed(const float* x, int n, bool streams, T* out) {
  int i = 0;
  if (streams) {
    for (; i + kLanes <= n; i += kLanes) stream(out + i, load(x + i));
  }
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; ++i) {
    T one;
    from_float(x[i], &one);
    std::memcpy(out + i, &one, sizeof(T));
  }
}

// p = x + old; both are widened in place of p and of `room`.
template <typename T, typename R>
void compensate(const T* x, const R* old, int n, float* p, float* room) {
  const float* a = widened(x, n, p);
  const float* b = widened(old, n, room);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(p + i, add(load(a + i), load(b + i)));
  for (; i < n; ++i) {
    float one, other;
    std::memcpy(&one, a + i, sizeof(float));
    std::memcpy(&other, b + i, sizeof(float));
    p[i] = one + other;
  }
}

// residual = rest, where R holds it.
template <typename R>
PYDIST_INLINE void keep_one(float rest, const R* old, R* residual) {
  R kept;
  std::memcpy(&kept, old, sizeof(R));
  const bool fits = (float_bits(rest) & kAbsMask) < FiniteLimit<R>::value;
  from_float(fits ? rest : to_float(kept), &kept);
  std::memcpy(residual, &kept, sizeof(R));
}

// residual = p - sent, where R holds it.
template <typename R>
void keep_rest(const float* p, const float* sent, int n, const R* old, R* residual) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec rest = sub(load(p + i), load(sent + i));
    const Mask fits = abs_below(rest, FiniteLimit<R>::value);
    store(residual + i, select(fits, rest, load(old + i)));
  }
  for (; i < n; ++i) keep_one(p[i] - sent[i], old + i, residual + i);
}

}  // namespace pydist::cpu::PYDIST_ISA
