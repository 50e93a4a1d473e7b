// sum_values: the float32 sum of all ranks' values in rank order, divided, rounded to storage. With
// one rank it is a conversion, or a copy that canonicalises NaN.
//
// Reads every rank's element once, writes one, and ORs into `flags` if any result is not finite.
#include "../rows.cuh"

namespace pydist::cuda {
namespace {

template <typename From, typename To, int kWidth, bool kVector>
PYDIST_DEVICE void sum_chunk(To* out, int n, int lane, const unsigned char* values,
                             const SumArgs& a, uint32_t* largest) {
  constexpr int kSteps = kWordBits / kWidth;
#pragma unroll 2
  for (int k = 0; k < kSteps; ++k) {
    const int i = kWidth * (k * kWarpSize + lane);
    if (!kVector && k * kWidth * kWarpSize >= n) break;
    float sum[kWidth];
    for (int64_t r = 0; r < a.ranks; ++r) {
      From v[kWidth];
      const From* x = reinterpret_cast<const From*>(values + r * a.stride);
      load_run<From, kWidth, kVector>(x, i, n, v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] = r ? sum[j] + widen(v[j]) : widen(v[j]);
    }
    To result[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (a.divisor != 1.0f) sum[j] = sum[j] / a.divisor;
      const uint32_t magnitude = float_bits(sum[j]) & kAbsMask;  // elements past n are zero
      *largest = magnitude > *largest ? magnitude : *largest;
      narrow(sum[j], &result[j]);
    }
    store_run<To, kWidth, kVector>(out, i, n, result);
  }
}

template <typename From, typename To>
__global__ void __launch_bounds__(kBlockThreads, 2)
    sum_values_kernel(Rows rows, SumArgs a, uint32_t* flags) {
  // 16 bytes at once of the wider type, at least 8 of the other.
  constexpr int kVectorWidth =
      16 / static_cast<int>(sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
  constexpr int kFrom = kVectorBytes<From, kVectorWidth>, kTo = kVectorBytes<To, kVectorWidth>;
  const int lane = lane_id();
  const auto base = reinterpret_cast<int64_t>(a.values);
  uint32_t largest = 0;
  for_chunks<kElementTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kElementTile>(row, start);
    To* out = device_pointer<To>(row.x) + start * kWordBits;
    const int64_t at = base + (row.word + start) * kWordBits * static_cast<int64_t>(sizeof(From));
    const unsigned char* values = device_pointer<const unsigned char>(at);
    const bool even = aligned<kFrom>(base) && (a.ranks == 1 || aligned<kFrom>(a.stride));
    if (n == kElementChunk && even && aligned<kTo>(row.x)) {
      sum_chunk<From, To, kVectorWidth, true>(out, n, lane, values, a, &largest);
    } else {
      sum_chunk<From, To, 1, false>(out, n, lane, values, a, &largest);
    }
  });
  raise_flags(flags, largest >= FiniteLimit<To>::value);
}

template <typename From>
void launch_typed(const Rows& rows, DType to, const SumArgs& args, uint32_t* flags, void* stream) {
  const auto run = [&](auto kernel) {
    launch_over<kElementTile>("sum_values", kernel, rows, stream, args, flags);
  };
  switch (to) {
    case DType::kFloat32:
      return run(sum_values_kernel<From, float>);
    case DType::kFloat16:
      return run(sum_values_kernel<From, Half>);
    case DType::kBFloat16:
      return run(sum_values_kernel<From, BFloat>);
  }
}

}  // namespace

void sum_values(const Rows& rows, DType from, DType to, const SumArgs& args, uint32_t* flags,
                void* stream) {
  switch (from) {
    case DType::kFloat32:
      return launch_typed<float>(rows, to, args, flags, stream);
    case DType::kFloat16:
      return launch_typed<Half>(rows, to, args, flags, stream);
    case DType::kBFloat16:
      return launch_typed<BFloat>(rows, to, args, flags, stream);
  }
}

}  // namespace pydist::cuda
