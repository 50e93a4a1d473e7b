// dequantize and reduce_quantized: what all ranks sent for a block, decoded, added in rank order
// and divided once; written as values, or quantized again.
#include "blocks.cuh"

namespace pydist::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2) dequantize_kernel(Rows rows, DecodeArgs a) {
  const int lane = lane_id();
  for_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const Reduced x(a, index, n);
    T* out = device_pointer<T>(row.x) + begin;
    const bool vector = aligned<16>(row.x);
#pragma unroll 1
    for (int i = kRun * lane; i < n; i += kWarpRun) {
      Run v;
      T values[kRun];
      x.run(i, v);
#pragma unroll
      for (int j = 0; j < kRun; ++j) narrow(v[j], &values[j]);
      if (vector && i + kRun <= n) {
        store_run<T, kRun, true>(out, i, n, values);
      } else {
        store_run<T, kRun, false>(out, i, n, values);
      }
    }
  });
}

template <bool kStochastic>
__global__ void __launch_bounds__(kBlockThreads, 2)
    reduce_quantized_kernel(Rows rows, DecodeArgs from, EncodeArgs to, uint32_t* flags) {
  const int lane = lane_id();
  bool finite = true;
  for_blocks(rows, from.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const auto nothing = [](int, const Run&, uint64_t, const Encoder&) {};
    const bool good = encode_block<kStochastic>(
        Reduced(from, index, n), index, n, to, draw_key(to, row), row.first + begin, lane, nothing);
    finite = finite && good;
  });
  raise_flags(flags, !finite);
}

}  // namespace

void dequantize(const Rows& rows, DType dtype, const DecodeArgs& args, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_blocks("dequantize", dequantize_kernel<float>, rows, stream, args);
    case DType::kFloat16:
      return launch_blocks("dequantize", dequantize_kernel<Half>, rows, stream, args);
    case DType::kBFloat16:
      return launch_blocks("dequantize", dequantize_kernel<BFloat>, rows, stream, args);
  }
}

void reduce_quantized(const Rows& rows, const DecodeArgs& from, const EncodeArgs& to,
                      uint32_t* flags, void* stream) {
  auto kernel =
      to.format.stochastic ? reduce_quantized_kernel<true> : reduce_quantized_kernel<false>;
  launch_blocks("reduce_quantized", kernel, rows, stream, from, to, flags);
}

}  // namespace pydist::cuda
