// What the kernel of plain values is given, whatever the backend.
#pragma once

#include "rounding.h"

namespace pydist {

// Sums go from payloads to the rows' elements, or from these into a payload: element i of a row's
// word w is value 32 * w + i of a payload.
struct SumArgs {
  const unsigned char* values;  // [ranks, stride] bytes; null: the rows' elements
  int64_t stride;               // bytes from one rank's values to the next
  int64_t ranks;
  float divisor;       // sums are divided by this: 1 for a sum, ranks for a mean
  unsigned char* out;  // where sums go; null: the rows' elements
};

template <typename T>
PYDIST_INLINE int64_t place_in_payload(const Row& row) {
  return row.message + row.word * kWordBits * static_cast<int64_t>(sizeof(T));
}

// Addresses of the first value and the first sum of a row.
template <typename From>
PYDIST_INLINE int64_t values_at(const SumArgs& a, const Row& row) {
  return a.values ? reinterpret_cast<int64_t>(a.values) + place_in_payload<From>(row) : row.x;
}
template <typename To>
PYDIST_INLINE int64_t sums_at(const SumArgs& a, const Row& row) {
  return a.out ? reinterpret_cast<int64_t>(a.out) + place_in_payload<To>(row) : row.x;
}

}  // namespace pydist
