// What a vote kernel is given, whatever the backend.
#pragma once

#include "layout.h"

namespace pydist {

struct VoteArgs {
  const unsigned char* payloads;  // [ranks, stride] bytes
  int64_t stride;                 // bytes from one rank's payload to the next
  int64_t ranks;
  unsigned char* out;  // [planes, plane_bytes]
  int64_t plane_bytes;
  Ties ties;
  uint32_t seed;
  int64_t step;
  const int64_t* step_at;  // CUDA: where the step is in device memory; null: `step` it is
};

struct Unpack {
  const unsigned char* planes;  // [planes, plane_bytes]
  int64_t plane_bytes;
  int count;      // planes
  int64_t ranks;  // 0: sign (and non-zero) planes; n: counts
  float divisor;  // values are divided by this: 1 for a sum, ranks for a mean
};

}  // namespace pydist
