// unpack_votes: the values of a vote, from sign planes (±1, 0) or count planes (sum or mean).
#include "../table.h"
#include "signs_planes.h"

namespace pydist::cpu::PYDIST_ISA {

template <typename T, PlaneKind kKind, bool kStream>
static void unpack_words(T* out, int64_t count, const unsigned char* planes, const Unpack& a) {
  const float ranks = static_cast<float>(a.ranks);
  uint32_t words[kMaxPlanes];
  for (int64_t w = 0; w < count; ++w) {
    load_planes(planes, a.plane_bytes, a.count, w, words);
    for (int j = 0; j < kWordBits; j += kLanes) {
      const Vec value = div(vote_value<kKind>(words, a.count, ranks, j), set1(a.divisor));
      if (kStream) {
        stream(out + kWordBits * w + j, value);
      } else {
        store(out + kWordBits * w + j, value);
      }
    }
  }
}

template <typename T, PlaneKind kKind>
static void unpack_piece(T* out, int64_t n, const unsigned char* planes, const Unpack& a) {
  const int64_t full = n / kWordBits;
  if (can_stream(out, n)) {
    unpack_words<T, kKind, true>(out, full, planes, a);
    stream_end();
  } else {
    unpack_words<T, kKind, false>(out, full, planes, a);
  }
  if (const int64_t rest = n - full * kWordBits) {  // the tail
    T tail[kWordBits];
    unpack_words<T, kKind, false>(tail, 1, planes + 4 * full, a);
    std::memcpy(out + full * kWordBits, tail, rest * sizeof(T));
  }
}

template <typename T>
void unpack_votes(void* out, int64_t n, const unsigned char* planes, const Unpack& a) {
  T* typed = static_cast<T*>(out);
  switch (plane_kind(a.count, a.ranks)) {
    case PlaneKind::kSign:
      return unpack_piece<T, PlaneKind::kSign>(typed, n, planes, a);
    case PlaneKind::kSignNonZero:
      return unpack_piece<T, PlaneKind::kSignNonZero>(typed, n, planes, a);
    case PlaneKind::kCounts:
      return unpack_piece<T, PlaneKind::kCounts>(typed, n, planes, a);
  }
}

template void unpack_votes<float>(void*, int64_t, const unsigned char*, const Unpack&);
template void unpack_votes<Half>(void*, int64_t, const unsigned char*, const Unpack&);
template void unpack_votes<BFloat>(void*, int64_t, const unsigned char*, const Unpack&);

}  // namespace pydist::cpu::PYDIST_ISA
