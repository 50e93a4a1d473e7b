// What an encoder reads a block from: runs of eight values, or one, as float32.
#pragma once

#include "rows.cuh"

namespace pydist::cuda {

constexpr int kRun = 8;  // elements of a lane at a time

using Run = float[kRun];

// A block of x.
template <typename T>
struct Plain {
  const T* x;
  int n;
  bool vector;

  // kWhole: the run is within the block, and the row aligned.
  template <bool kWhole = false>
  PYDIST_DEVICE_MEMBER void run(int i, Run& v) const {
    T raw[kRun];
    if (kWhole || (vector && i + kRun <= n)) {
      load_run<T, kRun, true>(x, i, n, raw);
    } else {
      load_run<T, kRun, false>(x, i, n, raw);
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = widen(raw[j]);
  }

  PYDIST_DEVICE_MEMBER float one(int i) const { return widen(x[i]); }
};

template <typename T>
PYDIST_DEVICE Plain<T> plain(int64_t address, int64_t begin, int n) {
  // Blocks are multiples of 32 elements: where a row is aligned, all of its blocks are.
  return {device_pointer<T>(address) + begin, n, aligned<16>(address)};
}

// The residual of a block; without memory where its row keeps none.
template <typename R>
PYDIST_DEVICE Plain<R> residual_of(const Row& row, int64_t begin, int n) {
  if (row.momentum) return plain<R>(row.momentum, begin, n);
  return {nullptr, n, false};
}

// A block of x + residual; of x where there is no residual.
template <typename T, typename R>
struct Compensated {
  Plain<T> x;
  Plain<R> residual;

  template <bool kWhole = false>
  PYDIST_DEVICE_MEMBER void run(int i, Run& v) const {
    Run r;
#pragma unroll
    for (int j = 0; j < kRun; ++j) r[j] = -0.0f;  // x + -0 is x, whatever its sign
    if (residual.x) residual.template run<kWhole>(i, r);
    x.template run<kWhole>(i, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = v[j] + r[j];
  }

  PYDIST_DEVICE_MEMBER float one(int i) const {
    return residual.x ? x.one(i) + residual.one(i) : x.one(i);
  }
};

}  // namespace pydist::cuda
