// sum_values: the float32 sum of all ranks' values in rank order, divided, rounded to storage. With
// one rank it is a conversion, or a copy that canonicalises NaN.
#include "../simd/simd.h"
#include "../table.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

// One vector of the result into `out`; and whether it stays finite there.
template <typename From, typename To, bool kDivide>
PYDIST_INLINE uint32_t sum_at(const unsigned char* values, const SumArgs& a, Vec divisor, To* out) {
  Vec sum = load(reinterpret_cast<const From*>(values));
  for (int64_t r = 1; r < a.ranks; ++r) {
    sum = add(sum, load(reinterpret_cast<const From*>(values + r * a.stride)));
  }
  if (kDivide) sum = div(sum, divisor);
  store(out, sum);
  return bits_of(abs_below(sum, FiniteLimit<To>::value));
}

template <typename From, typename To, bool kDivide>
uint32_t sum_piece(To* out, int64_t n, const unsigned char* values, const SumArgs& a) {
  const Vec divisor = set1(a.divisor);
  uint32_t finite = kLaneMask;
  const int64_t full = n / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) {
    finite &= sum_at<From, To, kDivide>(values + i * sizeof(From), a, divisor, out + i);
  }
  if (const int64_t rest = n - full) {  // the tail: rank by rank, so that nothing is read beyond it
    alignas(64) float sum[kLanes] = {};
    for (int64_t r = 0; r < a.ranks; ++r) {
      From part[kLanes] = {};
      std::memcpy(part, values + r * a.stride + full * sizeof(From), rest * sizeof(From));
      store(sum, r ? add(load(sum), load(part)) : load(part));
    }
    To tail[kLanes];
    const Vec value = kDivide ? div(load(sum), divisor) : load(sum);
    store(tail, value);
    finite &= bits_of(abs_below(value, FiniteLimit<To>::value));
    std::memcpy(out + full, tail, rest * sizeof(To));
  }
  return finite == kLaneMask ? 0 : kFlagNonFinite;
}

}  // namespace

template <typename From, typename To>
uint32_t sum_values(void* out, int64_t n, const unsigned char* values, const SumArgs& a) {
  To* typed = static_cast<To*>(out);
  return a.divisor == 1.0f ? sum_piece<From, To, false>(typed, n, values, a)
                           : sum_piece<From, To, true>(typed, n, values, a);
}

template uint32_t sum_values<float, float>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<float, Half>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<float, BFloat>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<Half, float>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<Half, Half>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<Half, BFloat>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<BFloat, float>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<BFloat, Half>(void*, int64_t, const unsigned char*, const SumArgs&);
template uint32_t sum_values<BFloat, BFloat>(void*, int64_t, const unsigned char*, const SumArgs&);

}  // namespace pydist::cpu::PYDIST_ISA
