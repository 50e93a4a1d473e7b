// lion_apply: weight decay and the voted update in one pass over the parameter.
#include "../table.h"
#include "signs_planes.h"

namespace pydist::cpu::PYDIST_ISA {

template <typename P, PlaneKind kKind>
PYDIST_INLINE void apply_word(P* x, const uint32_t* words, const LionApplyArgs& a) {
  for (int j = 0; j < kWordBits; j += kLanes) {
    const Vec vote = vote_value<kKind>(words, a.planes, static_cast<float>(a.ranks), j);
    const Vec update = mul(set1(a.step), vote);
    store(x + j, sub(mul(load(x + j), set1(a.decay)), update));
  }
}

template <typename P, PlaneKind kKind>
static void apply_piece(P* x, int64_t n, const unsigned char* planes, const LionApplyArgs& a) {
  uint32_t words[kMaxPlanes];
  const int64_t full = n / kWordBits;
  for (int64_t w = 0; w < full; ++w) {
    walks_word(x + kWordBits * w);
    load_planes(planes, 4 * a.plane_words, a.planes, w, words);
    apply_word<P, kKind>(x + kWordBits * w, words, a);
  }
  if (const int64_t rest = n - full * kWordBits) {  // the tail
    P tail[kWordBits] = {};
    std::memcpy(tail, x + full * kWordBits, rest * sizeof(P));
    load_planes(planes, 4 * a.plane_words, a.planes, full, words);
    apply_word<P, kKind>(tail, words, a);
    std::memcpy(x + full * kWordBits, tail, rest * sizeof(P));
  }
}

template <typename P>
void lion_apply(void* param, int64_t n, const unsigned char* planes, const LionApplyArgs& a) {
  P* x = static_cast<P*>(param);
  switch (plane_kind(a.planes, a.ranks)) {
    case PlaneKind::kSign:
      return apply_piece<P, PlaneKind::kSign>(x, n, planes, a);
    case PlaneKind::kSignNonZero:
      return apply_piece<P, PlaneKind::kSignNonZero>(x, n, planes, a);
    case PlaneKind::kCounts:
      return apply_piece<P, PlaneKind::kCounts>(x, n, planes, a);
  }
}

template void lion_apply<float>(void*, int64_t, const unsigned char*, const LionApplyArgs&);
template void lion_apply<Half>(void*, int64_t, const unsigned char*, const LionApplyArgs&);
template void lion_apply<BFloat>(void*, int64_t, const unsigned char*, const LionApplyArgs&);

}  // namespace pydist::cpu::PYDIST_ISA
