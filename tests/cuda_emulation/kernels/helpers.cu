// Helpers that kernels share, alone: what a kernel of pydist reaches for a few values only.
#include "division.cuh"
#include "test_kernels.h"

namespace {

constexpr int kRow = 8;

// out[k][i] = x[i] / divisors[k], a thread a divisor; `counts`: as the x are, which all may be.
__global__ void divisions(const float* x, int n, const float* divisors, int count, float* out,
                          bool counts) {
  const int k = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (k >= count) return;
  const pydist::cuda::Divisor d(divisors[k]);
  for (int i = 0; i < n; i += kRow) {
    float v[kRow];
    for (int j = 0; j < kRow; ++j) v[j] = x[i + j];
    if (counts) {
      for (int j = 0; j < kRow; ++j) v[j] = pydist::cuda::divided(v[j], d);
    } else {
      pydist::cuda::divide(v, d);
    }
    for (int j = 0; j < kRow; ++j) out[k * static_cast<int64_t>(n) + i + j] = v[j];
  }
}

}  // namespace

extern "C" const char* run_divisions(const float* x, int n, const float* divisors, int count,
                                     float* out, int counts) {
  const unsigned blocks = static_cast<unsigned>((count + 127) / 128);
  return launch_test(divisions, dim3(blocks), dim3(128), 0, x, n, divisors, count, out,
                     counts != 0);
}
