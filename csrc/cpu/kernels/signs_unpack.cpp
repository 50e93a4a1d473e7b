// unpack_votes: the values of a vote, from sign planes (±1, 0) or count planes (sum or mean).
#include <type_traits>

#include "../table.h"
#include "signs_planes.h"

namespace pydist::cpu::PYDIST_ISA {

// ------------------------------------------------------------ signs

// The values of +1 and -1, as bit patterns of T.
template <typename T>
struct SignValues {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  Bits plus, minus;

  explicit SignValues(float divisor) : plus(bits(1.0f / divisor)), minus(bits(-1.0f / divisor)) {}

  static Bits bits(float value) {
    T narrow;
    from_float(value, &narrow);
    Bits pattern;
    std::memcpy(&pattern, &narrow, sizeof(T));
    return pattern;
  }
};

template <typename T, PlaneKind kKind, bool kStream>
static void unpack_signs(T* out, int64_t count, const unsigned char* planes, const Unpack& a) {
  using Bits = typename SignValues<T>::Bits;
  constexpr int kEach = sizeof(Wide) / sizeof(T);
  constexpr int kPlanes = kKind == PlaneKind::kSign ? 1 : 2;
  const SignValues<T> values(a.divisor);
  uint32_t words[kPlanes];
  for (int64_t w = 0; w < count; ++w) {
    load_planes(planes, a.plane_bytes, kPlanes, w, words);
    for (int j = 0; j < kWordBits; j += kEach) {
      Wide x = choose(words[0] >> j, values.plus, values.minus);
      if (kKind == PlaneKind::kSignNonZero) {
        x = wide_and(x, choose(words[kPlanes - 1] >> j, static_cast<Bits>(~0u), Bits{0}));
      }
      if (kStream) {
        wide_stream(out + kWordBits * w + j, x);
      } else {
        wide_store(out + kWordBits * w + j, x);
      }
    }
  }
}

// ------------------------------------------------------------ counts

template <typename T, bool kStream>
static void unpack_counts(T* out, int64_t count, const unsigned char* planes, const Unpack& a) {
  const float ranks = static_cast<float>(a.ranks);
  const bool divides = a.divisor != 1.0f;
  uint32_t words[kMaxPlanes];
  for (int64_t w = 0; w < count; ++w) {
    load_planes(planes, a.plane_bytes, a.count, w, words);
    for (int j = 0; j < kWordBits; j += kLanes) {
      Vec value = vote_value<PlaneKind::kCounts>(words, a.count, ranks, j);
      if (divides) value = div(value, set1(a.divisor));
      if (kStream) {
        stream(out + kWordBits * w + j, value);
      } else {
        store(out + kWordBits * w + j, value);
      }
    }
  }
}

// ------------------------------------------------------------ pieces

template <typename T, PlaneKind kKind, bool kStream>
static void unpack_words(T* out, int64_t count, const unsigned char* planes, const Unpack& a) {
  if constexpr (kKind == PlaneKind::kCounts) {
    unpack_counts<T, kStream>(out, count, planes, a);
  } else {
    unpack_signs<T, kKind, kStream>(out, count, planes, a);
  }
}

template <typename T, PlaneKind kKind>
static void unpack_piece(T* out, int64_t n, const unsigned char* planes, const Unpack& a,
                         bool streams) {
  const int64_t full = n / kWordBits;
  if (streams && reinterpret_cast<uintptr_t>(out) % sizeof(Wide) == 0) {
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
void unpack_votes(void* out, int64_t n, const unsigned char* planes, const Unpack& a,
                  bool streams) {
  T* typed = static_cast<T*>(out);
  switch (plane_kind(a.count, a.ranks)) {
    case PlaneKind::kSign:
      return unpack_piece<T, PlaneKind::kSign>(typed, n, planes, a, streams);
    case PlaneKind::kSignNonZero:
      return unpack_piece<T, PlaneKind::kSignNonZero>(typed, n, planes, a, streams);
    case PlaneKind::kCounts:
      return unpack_piece<T, PlaneKind::kCounts>(typed, n, planes, a, streams);
  }
}

template void unpack_votes<float>(void*, int64_t, const unsigned char*, const Unpack&, bool);
template void unpack_votes<Half>(void*, int64_t, const unsigned char*, const Unpack&, bool);
template void unpack_votes<BFloat>(void*, int64_t, const unsigned char*, const Unpack&, bool);

}  // namespace pydist::cpu::PYDIST_ISA
