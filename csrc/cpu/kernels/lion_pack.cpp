// lion_pack: direction, its sign bit, and the new momentum in one pass over gradient and momentum.
#include "../simd/philox.h"
#include "../simd/simd.h"
#include "../table.h"

namespace pydist::cpu::PYDIST_ISA {

template <typename G, typename M, bool kStochastic>
PYDIST_INLINE uint32_t lion_word(const G* grad, const M* momentum, M* momentum_out,
                                 const LionPackArgs& a, const WidePhilox& philox, int64_t first,
                                 Mask* finite) {
  DrawBuffer<kWordBits> buffer;
  const uint16_t* draws = kStochastic ? buffer.fill(philox, first) : nullptr;
  uint32_t word = 0;
  for (int j = 0; j < kWordBits; j += kLanes) {
    const Vec g = load(grad + j);
    const Vec m = load(momentum + j);
    const Vec c = add(mul(set1(a.beta1), m), mul(set1(a.one_minus_beta1), g));
    Mask positive;
    if (kStochastic) {
      const Vec t = mul(add(mul(c, set1(a.inv_range)), set1(1.0f)), set1(32768.0f));
      positive = greater(t, load_halves(draws + j));
    } else {
      positive = a.zero_bit ? greater_equal(c, set1(0.0f)) : greater(c, set1(0.0f));
    }
    word |= bits_of(positive) << j;
    const Vec next = add(mul(set1(a.beta2), m), mul(set1(a.one_minus_beta2), g));
    // An element whose gradient or new momentum is not finite keeps its old momentum.
    const Mask keep = both(abs_below(g, kInfBits), abs_below(next, FiniteLimit<M>::value));
    store(momentum_out + j, select(keep, next, m));
    *finite = both(*finite, keep);
  }
  return word;
}

template <typename G, typename M, bool kStochastic>
static uint32_t lion_pack_piece(const Row& row, unsigned char* words, const LionPackArgs& a) {
  const G* grad = reinterpret_cast<const G*>(row.x);
  const M* momentum = reinterpret_cast<const M*>(row.momentum);
  M* momentum_out = reinterpret_cast<M*>(row.momentum_out);
  const WidePhilox philox({a.seed, a.key1, a.step, static_cast<uint32_t>(row.ordinal)});
  Mask finite = mask_from(kLaneMask);
  const int64_t full = row.n / kWordBits;
  for (int64_t w = 0; w < full; ++w) {
    const int64_t i = w * kWordBits;
    walks_word(grad + i);
    walks_word(momentum + i);
    store_word(words + 4 * w, lion_word<G, M, kStochastic>(grad + i, momentum + i, momentum_out + i,
                                                           a, philox, row.first + i, &finite));
  }
  if (const int64_t rest = row.n - full * kWordBits) {  // the tail, padded with zeros
    const int64_t i = full * kWordBits;
    G tail_grad[kWordBits] = {};
    M tail_momentum[kWordBits] = {};
    std::memcpy(tail_grad, grad + i, rest * sizeof(G));
    std::memcpy(tail_momentum, momentum + i, rest * sizeof(M));
    const uint32_t word = lion_word<G, M, kStochastic>(tail_grad, tail_momentum, tail_momentum, a,
                                                       philox, row.first + i, &finite);
    store_word(words + 4 * full, word & word_mask(rest));
    std::memcpy(momentum_out + i, tail_momentum, rest * sizeof(M));
  }
  return bits_of(finite) == kLaneMask ? 0u : kFlagNonFinite;
}

template <typename G, typename M>
uint32_t lion_pack(const Row& row, unsigned char* words, const LionPackArgs& a) {
  return a.inv_range != 0.0f ? lion_pack_piece<G, M, true>(row, words, a)
                             : lion_pack_piece<G, M, false>(row, words, a);
}

template uint32_t lion_pack<float, float>(const Row&, unsigned char*, const LionPackArgs&);
template uint32_t lion_pack<Half, float>(const Row&, unsigned char*, const LionPackArgs&);
template uint32_t lion_pack<BFloat, float>(const Row&, unsigned char*, const LionPackArgs&);
template uint32_t lion_pack<float, BFloat>(const Row&, unsigned char*, const LionPackArgs&);
template uint32_t lion_pack<Half, BFloat>(const Row&, unsigned char*, const LionPackArgs&);
template uint32_t lion_pack<BFloat, BFloat>(const Row&, unsigned char*, const LionPackArgs&);

}  // namespace pydist::cpu::PYDIST_ISA
