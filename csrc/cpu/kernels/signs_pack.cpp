// pack_signs: one bit per element, 1 for positive; zeros take zero_bit, NaN takes 0.
#include "../simd/simd.h"
#include "../table.h"

namespace pydist::cpu::PYDIST_ISA {

template <typename T>
PYDIST_INLINE uint32_t sign_word(const T* x, bool zero_bit, Mask* finite) {
  uint32_t word = 0;
  for (int j = 0; j < kWordBits; j += kLanes) {
    const Vec v = load(x + j);
    const Mask m = zero_bit ? greater_equal(v, set1(0.0f)) : greater(v, set1(0.0f));
    word |= bits_of(m) << j;
    *finite = both(*finite, abs_below(v, kInfBits));
  }
  return word;
}

template <typename T, bool kZeroBit>
static uint32_t pack_piece(const T* x, int64_t n, unsigned char* words) {
  Mask finite = mask_from(kLaneMask);
  const int64_t full = n / kWordBits;
  for (int64_t w = 0; w < full; ++w) {
    prefetch_word(x + kWordBits * w);
    store_word(words + 4 * w, sign_word(x + kWordBits * w, kZeroBit, &finite));
  }
  if (const int64_t rest = n - full * kWordBits) {  // the tail, padded with zeros
    T tail[kWordBits] = {};
    std::memcpy(tail, x + full * kWordBits, rest * sizeof(T));
    store_word(words + 4 * full, sign_word(tail, kZeroBit, &finite) & word_mask(rest));
  }
  return bits_of(finite) == kLaneMask ? 0u : kFlagNonFinite;
}

template <typename T>
uint32_t pack_signs(const void* x, int64_t n, unsigned char* words, uint32_t zero_bit) {
  const T* typed = static_cast<const T*>(x);
  return zero_bit ? pack_piece<T, true>(typed, n, words) : pack_piece<T, false>(typed, n, words);
}

template uint32_t pack_signs<float>(const void*, int64_t, unsigned char*, uint32_t);
template uint32_t pack_signs<Half>(const void*, int64_t, unsigned char*, uint32_t);
template uint32_t pack_signs<BFloat>(const void*, int64_t, unsigned char*, uint32_t);

}  // namespace pydist::cpu::PYDIST_ISA
