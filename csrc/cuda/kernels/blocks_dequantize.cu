// dequantize and reduce_quantized: what all ranks sent for a block, decoded, added in rank order
// and divided once; written as values, or quantized again.
#include "blocks_decode.cuh"
#include "blocks_encode.cuh"

namespace pydist::cuda {
namespace {

using OneByOne = Reduced<1>;  // most often of one rank alone
using FourAhead = Reduced<4>;

template <typename T>
PYDIST_DEVICE void decode_tile(const OneByOne& x, T* out) {
  Tile v;
  const bool numbers = __all_sync(kAllLanes, x.tile(v));
  if (numbers) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) store_step(out + s * kWarpRun, v[s]);
    return;
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    store_values(out, s * kWarpRun + kRun * lane_id(), kTileElements, true, v[s]);
  }
}

template <typename T>
PYDIST_DEVICE void decode_block(const OneByOne& x, bool vector, T* out) {
#pragma unroll 1
  for (int begin = 0; begin < x.n; begin += kWarpRun) {
    const int i = begin + kRun * lane_id();
    Run v;
    x.run(i, v);
    store_values(out, i, x.n, vector, v);
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 3) dequantize_kernel(Rows rows, DecodeArgs a) {
  const Tiling tiling(a.format.block);
  const Ranks ranks(a, tiling);
  for_groups<false>(rows, tiling, [&](const Row& row, const Group& group) {
    T* out = device_pointer<T>(row.x);
    if (aligned<16>(row.x) && ranks.in_words() && group.whole(tiling)) {
      decode_tile(OneByOne(ranks, group, tiling), out + group.begin);
      return;
    }
#pragma unroll 1
    for (int k = 0; k < group.blocks(tiling); ++k) {
      const Group block = group.at(k, tiling);
      decode_block(OneByOne(ranks, block, tiling), aligned<16>(row.x), out + block.begin);
    }
  });
}

template <bool kStochastic>
__global__ void __launch_bounds__(kBlockThreads, 2)
    reduce_quantized_kernel(Rows rows, DecodeArgs from, EncodeArgs to, uint32_t* flags) {
  const Tiling tiling(from.format.block);
  const Ranks ranks(from, tiling);
  encode_rows<kStochastic, false>(
      rows, to, tiling, ranks.in_words(), flags, [&](const Row&, const Group& group) {
        return Encoding<FourAhead, Nothing>{FourAhead(ranks, group, tiling), {}};
      });
}

}  // namespace

void dequantize(const Rows& rows, DType dtype, const DecodeArgs& args, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_groups("dequantize", args.format.block, dequantize_kernel<float>, rows, stream,
                           args);
    case DType::kFloat16:
      return launch_groups("dequantize", args.format.block, dequantize_kernel<Half>, rows, stream,
                           args);
    case DType::kBFloat16:
      return launch_groups("dequantize", args.format.block, dequantize_kernel<BFloat>, rows, stream,
                           args);
  }
}

void reduce_quantized(const Rows& rows, const DecodeArgs& from, const EncodeArgs& to,
                      uint32_t* flags, void* stream) {
  auto kernel =
      to.format.stochastic ? reduce_quantized_kernel<true> : reduce_quantized_kernel<false>;
  launch_groups("reduce_quantized", to.format.block, kernel, rows, stream, from, to, flags);
}

}  // namespace pydist::cuda
