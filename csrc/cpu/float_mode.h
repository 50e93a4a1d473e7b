// The float mode that kernels and their scalars are computed in, whatever the calling thread's is.
#pragma once

#if defined(PYDIST_X86)
#include <immintrin.h>
#endif

namespace pydist::cpu {

// Subnormals are ordinary numbers: torch.set_flush_denormal(True) would make 1e-40 > 0 false.
// Rounding is to nearest even.
class DefaultFloatMode {
 public:
#if defined(PYDIST_X86)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Rounds a scalar argument once, to float32. In a call of its own, so that the compiler can't move
// the rounding out of the default mode.
#if defined(__GNUC__)
__attribute__((noinline))
#endif
inline float round_scalar(double x) {
  return static_cast<float>(x);
}

}  // namespace pydist::cpu
