// Four words of bits to four words of nibbles, and back.
#pragma once

#include "common.cuh"

namespace pydist::cuda {

constexpr int kNibble = 4;

// Transposes the 4 x 4 bits (word, bit) of every nibble of four words w: bit k of nibble q of word
// j becomes what bit j of nibble q of word k was. So of four bit planes, word j becomes the nibbles
// of the elements 4 * q + j. Its own inverse.
PYDIST_DEVICE void transpose_nibbles(uint32_t* w) {
  constexpr uint32_t kEven = 0x55555555u, kLow = 0x33333333u;
#pragma unroll
  for (int i = 0; i < kNibble; i += 2) {
    const uint32_t even = (w[i] & kEven) | (w[i + 1] << 1 & ~kEven);
    const uint32_t odd = (w[i] >> 1 & kEven) | (w[i + 1] & ~kEven);
    w[i] = even, w[i + 1] = odd;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = (w[i] & kLow) | (w[i + 2] << 2 & ~kLow);
    const uint32_t high = (w[i] >> 2 & kLow) | (w[i + 2] & ~kLow);
    w[i] = low, w[i + 2] = high;
  }
}

}  // namespace pydist::cuda
