// Values of any type as float32 and back.
#pragma once

#include "simd.h"

namespace pydist::cpu::PYDIST_ISA {

// x as float32: where it is, if that is what it is; else in `room`.
PYDIST_INLINE const float* widened(const float* x, int, float*) { return x; }

template <typename T>
PYDIST_INLINE const float* widened(const T* x, int n, float* room) {
  int i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    prefetch_word(x + i);
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

}  // namespace pydist::cpu::PYDIST_ISA
