// The arithmetic of Lion, one element at a time; Distributed Lion (arXiv 2404.00438), Algorithm 1.
// Every product and sum is rounded on its own (the build forbids contraction into fma), which is
// what makes CPU, CUDA and the NumPy reference bit-identical.
#pragma once

#include "philox.h"
#include "rounding.h"

namespace pydist {

struct LionPackArgs {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  uint32_t zero_bit;          // what a direction of exactly zero encodes as
  float inv_range;            // 1 / r of the stochastic binarisation; 0 for plain signs
  uint32_t seed, key1, step;  // the place of the random draws
  const int64_t* step_at;     // CUDA: where the step is in device memory; null: `step` it is
};

struct LionApplyArgs {
  float decay;  // 1 - lr * weight_decay
  float step;   // lr for sign planes, lr / ranks for count planes
  int planes;   // 1: sign; 2: sign and non-zero; counts: planes_for(ranks)
  int64_t plane_words;
  int64_t ranks;  // 0: sign planes; n: planes hold counts of 0 ... n
};

// c = beta1 * m + (1 - beta1) * g, and likewise the new momentum with beta2.
PYDIST_INLINE float lion_mix(float beta, float m, float one_minus_beta, float g) {
  const float kept = beta * m;
  const float added = one_minus_beta * g;
  return kept + added;
}

// x - lr * (delta + weight_decay * x), as x * decay - update.
PYDIST_INLINE float lion_step(float x, float decay, float update) {
  const float shrunk = x * decay;
  return shrunk - update;
}

// Probability of a +1, in 1/65536: (1 + c / r) / 2. A draw below it votes +1.
PYDIST_INLINE float vote_threshold(float c, float inv_range) {
  const float ratio = c * inv_range;
  const float shifted = ratio + 1.0f;
  return shifted * 32768.0f;
}

}  // namespace pydist
