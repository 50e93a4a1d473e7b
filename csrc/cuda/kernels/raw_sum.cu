// sum_values: the float32 sum of all ranks' values in rank order, divided, rounded to storage. With
// one rank it is a conversion, or a copy that canonicalises NaN.
//
// Reads every rank's element once, writes one, and ORs into `flags` if any result is not finite.
#include "../division.cuh"
#include "../rows.cuh"

namespace pydist::cuda {
namespace {

// Calls body(k, j) for every element of a batch of runs.
template <int kBatch, int kWidth, typename Body>
PYDIST_DEVICE void for_all(const float (&)[kBatch][kWidth], const Body& body) {
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) body(k, j);
  }
}

// v = runs of rank r's values from step k0 on: loads in flight.
template <typename From, int kWidth, bool kVector, int kBatch>
PYDIST_DEVICE void load_steps(const SumArgs& a, const unsigned char* values, int64_t r, int k0,
                              int n, int lane, From (&v)[kBatch][kWidth]) {
  const From* x = reinterpret_cast<const From*>(values + r * a.stride);
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    load_run<From, kWidth, kVector>(x, kWidth * ((k0 + k) * kWarpSize + lane), n, v[k]);
  }
}

template <typename From, typename To, int kWidth, bool kVector>
PYDIST_DEVICE void sum_chunk(To* out, int n, int lane, const unsigned char* values,
                             const SumArgs& a, const Divisor& d, uint32_t* largest) {
  constexpr int kSteps = kWordBits / kWidth;
  constexpr int kBatch = kVector ? 16 / kWidth : 4;
#pragma unroll 1
  for (int k0 = 0; k0 < kSteps; k0 += kBatch) {
    if (!kVector && k0 * kWidth * kWarpSize >= n) break;
    From v[kBatch][kWidth];
    float sum[kBatch][kWidth];
    load_steps<From, kWidth, kVector>(a, values, 0, k0, n, lane, v);
    for_all(sum, [&](int k, int j) { sum[k][j] = widen(v[k][j]); });
#pragma unroll 1
    for (int64_t r = 1; r < a.ranks; ++r) {
      load_steps<From, kWidth, kVector>(a, values, r, k0, n, lane, v);
      for_all(sum, [&](int k, int j) { sum[k][j] = sum[k][j] + widen(v[k][j]); });
    }
    if (d.value != 1.0f) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) divide(sum[k], d);
    }
    To result[kBatch][kWidth];
    for_all(sum, [&](int k, int j) {
      const uint32_t magnitude = float_bits(sum[k][j]) & kAbsMask;  // elements past n are zero
      *largest = magnitude > *largest ? magnitude : *largest;
      narrow(sum[k][j], &result[k][j]);
    });
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      store_run<To, kWidth, kVector>(out, kWidth * ((k0 + k) * kWarpSize + lane), n, result[k]);
    }
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
  const Divisor d(a.divisor);
  uint32_t largest = 0;
  for_chunks<kElementTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kElementTile>(row, start);
    const int64_t from = values_at<From>(a, row), to = sums_at<To>(a, row);
    const auto* values = reinterpret_cast<const unsigned char*>(device_pointer<const From>(from) +
                                                                start * kWordBits);
    To* out = device_pointer<To>(to) + start * kWordBits;
    const bool even = aligned<kFrom>(from) && (a.ranks == 1 || aligned<kFrom>(a.stride));
    if (n == kElementChunk && even && aligned<kTo>(to)) {
      sum_chunk<From, To, kVectorWidth, true>(out, n, lane, values, a, d, &largest);
    } else {
      sum_chunk<From, To, 1, false>(out, n, lane, values, a, d, &largest);
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
