// What the kernel of plain values is given, whatever the backend.
#pragma once

#include "rounding.h"

namespace pydist {

struct SumArgs {
  const unsigned char* values;  // [ranks, stride] bytes; element i of a row's word w at 32 * w + i
  int64_t stride;               // bytes from one rank's values to the next
  int64_t ranks;
  float divisor;  // sums are divided by this: 1 for a sum, ranks for a mean
};

}  // namespace pydist
