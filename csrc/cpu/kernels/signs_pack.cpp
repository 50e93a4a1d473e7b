// pack_signs: one bit per element, 1 for positive; zeros take zero_bit, NaN takes 0.
#include "../simd/simd.h"
#include "../table.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr uint16_t infinity_of(Half) { return 0x7C00; }
constexpr uint16_t infinity_of(BFloat) { return 0x7F80; }

// The signs of words of 32 elements, and whether all elements so far were finite. Floats of 16 bits
// are looked at as integers: the positive ones are 1 ... kInfinity, +0 comes just before them, and
// -0 is 0x8000.
template <typename T>
class Signs {
 public:
  template <bool kZeroBit>
  uint32_t word(const T* x) {
    const Wide magnitude = wide_set1(0x7FFF * kEach),
               lift = wide_set1((0x8000 - kInfinity) * kEach);
    for (int j = 0; j < kWordBits; j += sizeof(Wide) / sizeof(T)) {
      lifted_ = wide_or(lifted_, wide_add(wide_and(wide_load(x + j), magnitude), lift));
    }
    if (!kZeroBit) return halves_below(x, 1, kInfinity);
    return halves_below(x, 0, kInfinity + 1) | halves_below(x, 0x8000, 1);
  }

  bool finite() const {
    uint64_t lanes[kWideLanes], any = 0;
    wide_store(lanes, lifted_);
    for (const uint64_t lane : lanes) any |= lane;
    return (any & 0x8000 * kEach) == 0;
  }

 private:
  static constexpr uint16_t kInfinity = infinity_of(T{});
  static constexpr uint64_t kEach = 0x0001000100010001u;  // 16 bits of a 64-bit lane
  Wide lifted_ = wide_set1(0);  // magnitudes, moved so that an infinity and NaN reach 0x8000
};

template <>
class Signs<float> {
 public:
  template <bool kZeroBit>
  uint32_t word(const float* x) {
    const Vec zero = set1(0.0f);
    uint32_t word = 0;
    for (int j = 0; j < kWordBits; j += kLanes) {
      const Vec v = load(x + j);
      const Mask m = kZeroBit ? greater_equal(v, zero) : greater(v, zero);
      word |= bits_of(m) << j;
      Vec& most = j / kLanes % 2 ? odd_ : even_;
      most = max_bits(most, abs(v));
    }
    return word;
  }

  bool finite() const { return top_bits(max_bits(even_, odd_)) < kInfBits; }

 private:
  Vec even_ = set1(0.0f), odd_ = set1(0.0f);  // largest magnitudes; two, so that neither waits
};

template <typename T, bool kZeroBit>
static uint32_t pack_piece(const T* x, int64_t n, unsigned char* words) {
  constexpr int kRun = 16;  // words
  Signs<T> signs;
  const auto put = [&](int64_t w) {
    store_word(words + 4 * w, signs.template word<kZeroBit>(x + kWordBits * w));
  };
  const int64_t full = n / kWordBits;
  int64_t w = 0;
  for (; w + kRun <= full; w += kRun) {
    walks(x + kWordBits * w, kRun * kWordBits * sizeof(T));
    for (int i = 0; i < kRun; ++i) put(w + i);
  }
  for (; w < full; ++w) put(w);
  if (const int64_t rest = n - full * kWordBits) {  // the tail, padded with zeros
    T tail[kWordBits] = {};
    std::memcpy(tail, x + full * kWordBits, rest * sizeof(T));
    store_word(words + 4 * full, signs.template word<kZeroBit>(tail) & word_mask(rest));
  }
  return signs.finite() ? 0u : kFlagNonFinite;
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
