// The float mode that kernels and their scalars are computed in, whatever the calling thread's is.
#pragma once

#include <cstdint>
#if defined(PYDIST_X86)
#include <immintrin.h>
#endif

namespace pydist::cpu {

// The register that holds it: MXCSR on x86, FPCR on AArch64. In the default mode subnormals are
// ordinary numbers (torch.set_flush_denormal(True) would make 1e-40 > 0 false), rounding is to
// nearest even, and nothing traps.
#if defined(PYDIST_X86)
constexpr uint64_t kDefaultFloatMode = 0x1F80;
inline uint64_t float_mode() { return _mm_getcsr(); }
inline void set_float_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(PYDIST_AARCH64)
constexpr uint64_t kDefaultFloatMode = 0;
inline uint64_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode)::"memory");
  return mode;
}
inline void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#else
constexpr uint64_t kDefaultFloatMode = 0;
inline uint64_t float_mode() { return kDefaultFloatMode; }
inline void set_float_mode(uint64_t) {}
#endif

// The default mode for as long as it lives.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : saved_(float_mode()) { set_float_mode(kDefaultFloatMode); }
  ~DefaultFloatMode() { set_float_mode(saved_); }

 private:
  uint64_t saved_;
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
