// ternary_scale and ternary_pack: the scaler of each row, and its values as trits, five to a byte.
//
// The scaler takes two launches: a warp sums a segment of 4,096 elements, then a warp adds up the
// segments of a row. To pack, a warp takes eight units: a lane takes 8 of the 32 bytes of a unit,
// which are five runs of eight consecutive elements, a Philox group each.
#include "../../wire/ternary.h"
#include "blocks.cuh"

namespace pydist::cuda {
namespace {

// ------------------------------------------------------------ scalers

PYDIST_DEVICE uint32_t warp_largest(uint32_t largest) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = other > largest ? other : largest;
  }
  return largest;
}

PYDIST_DEVICE float warp_sum(float sum) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    sum = sum + bits_float(__shfl_xor_sync(kAllLanes, float_bits(sum), distance));
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    ternary_segments_kernel(Rows rows, SegmentSum* sums) {
  const int lane = lane_id();
  for_blocks(rows, kSumSegment, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const T* x = device_pointer<T>(row.x) + begin;
    uint32_t largest = 0;
#pragma unroll 8
    for (int i = lane; i < n; i += kWarpSize) {
      const uint32_t magnitude = float_bits(widen(x[i])) & kAbsMask;
      largest = magnitude > largest ? magnitude : largest;
    }
    largest = warp_largest(largest);
    float sum = 0.0f;
    if (largest < kInfBits) {
      const float factor = power_of_two(-sum_exponent(largest));
#pragma unroll 8
      for (int i = lane; i < n; i += kWarpSize) {
        const float y = widen(x[i]) * factor;
        sum = sum + y * y;
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[index] = {largest, sum};
  });
}

__global__ void __launch_bounds__(kBlockThreads, 4)
    ternary_scale_kernel(Rows rows, TernaryScaleArgs a, uint32_t* flags) {
  const int lane = lane_id();
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kBlockWarps;
  int64_t r = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarpSize;
  bool finite = true;
  for (; r < rows.count; r += warps) {
    const Row row = row_at(rows, r);
    const SegmentSum* sums = a.scratch + row.word;
    const int64_t count = (row.n + kSumSegment - 1) / kSumSegment;
    uint32_t largest = 0;
#pragma unroll 4
    for (int64_t i = lane; i < count; i += kWarpSize) {
      largest = sums[i].largest > largest ? sums[i].largest : largest;
    }
    largest = warp_largest(largest);
    const int top = sum_exponent(largest);
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = lane; i < count; i += kWarpSize) {
      const SegmentSum part = sums[i];
      sum = sum + rescaled_squares(part.squares, part.largest, top);
    }
    sum = warp_sum(sum);
    const float mean = row.n ? sum / static_cast<float>(row.n) : 0.0f;
    float scaler = bits_float(kNanBits);
    if (largest < kInfBits) scaler = scaler_of(a.clip, largest, __fsqrt_rn(mean), top);
    if (lane == 0) store_word(device_pointer<unsigned char>(row.momentum), float_bits(scaler));
    finite = finite && largest < kInfBits;
  }
  raise_flags(flags, !finite);
}

template <typename T>
void launch_scale(const Rows& rows, const TernaryScaleArgs& a, uint32_t* flags, void* stream) {
  launch_blocks("ternary_scale", ternary_segments_kernel<T>, rows, stream, a.scratch);
  if (rows.count == 0) return;
  const int64_t blocks = (rows.count + kBlockWarps - 1) / kBlockWarps;
  const unsigned grid =
      static_cast<unsigned>(blocks < PYDIST_CUDA_MAX_BLOCKS ? blocks : PYDIST_CUDA_MAX_BLOCKS);
  launch("ternary_scale", ternary_scale_kernel, grid, kBlockThreads, stream, rows, a, flags);
}

// ------------------------------------------------------------ trits

constexpr int kWarpUnits = 8;
constexpr int kLanesAUnit = kWarpSize / kWarpUnits;

// Four digits of eight, a byte each: 0 for zero, 1 for plus, 2 for minus.
template <int kFrom>
PYDIST_DEVICE uint32_t four_digits(const Run& v, const TritScale& s, const Philox4& draws,
                                   bool* finite) {
  uint32_t digits = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = float_bits(v[kFrom + j]);
    const uint32_t magnitude = bits & kAbsMask;
    const bool good = magnitude < kInfBits;
    const float x = bits_float(magnitude);
    const float a = good ? (x < s.limit ? x : s.limit) : 0.0f;
    const float draw = static_cast<float>(static_cast<int>(draw16(draws, kFrom + j)));
    const uint32_t digit = a * s.factor > draw ? 1u + (bits >> 31) : 0u;
    digits |= digit << (8 * j);
    *finite = *finite && good;
  }
  return digits;
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    ternary_pack_kernel(Rows rows, TernaryPackArgs a, uint32_t* flags) {
  const int lane = lane_id();
  const auto step = static_cast<uint32_t>(step_of(a));
  bool finite = true;
  for_blocks(rows, kWarpUnits * kUnit, [&](const Row& row, int64_t, int64_t begin, int n) {
    const TritScale scale =
        trit_scale(bits_float(load_word(device_pointer<unsigned char>(row.momentum))),
                   bits_float(load_word(device_pointer<unsigned char>(row.momentum_out))));
    const DrawKey key = {a.seed, a.key1, step, static_cast<uint32_t>(row.ordinal)};
    const T* x = device_pointer<T>(row.x) + begin;
    const bool vector = aligned<16>(row.x);
    const int unit = lane / kLanesAUnit, byte = kRun * (lane % kLanesAUnit);
    if (unit * kUnit >= n) return;
    uint32_t low = 0, high = 0;  // the lane's eight bytes
#pragma unroll 1
    for (int digit = kDigits - 1; digit >= 0; --digit) {
      const int i = unit * kUnit + digit * kUnitBytes + byte;
      low *= 3, high *= 3;  // no byte overflows: 80 * 3 + 2 is 242
      if (i >= n) continue;
      T raw[kRun];
      if (vector && i + kRun <= n) {
        load_run<T, kRun, true>(x, i, n, raw);
      } else {
        load_run<T, kRun, false>(x, i, n, raw);
      }
      Run v;
#pragma unroll
      for (int j = 0; j < kRun; ++j) v[j] = widen(raw[j]);
      const Philox4 draws = draw_bits(key, static_cast<uint64_t>(row.first + begin + i) * 16);
      low += four_digits<0>(v, scale, draws, &finite);
      high += four_digits<4>(v, scale, draws, &finite);
    }
    const int64_t at = (row.word + begin / kUnit + unit) * kUnitBytes + byte;
    if (at < a.bytes) store_word(a.payload + at, low);
    if (at + 4 < a.bytes) store_word(a.payload + at + 4, high);
  });
  raise_flags(flags, !finite);
}

}  // namespace

void ternary_scale(const Rows& rows, DType dtype, const TernaryScaleArgs& args, uint32_t* flags,
                   void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_scale<float>(rows, args, flags, stream);
    case DType::kFloat16:
      return launch_scale<Half>(rows, args, flags, stream);
    case DType::kBFloat16:
      return launch_scale<BFloat>(rows, args, flags, stream);
  }
}

void ternary_pack(const Rows& rows, DType dtype, const TernaryPackArgs& args, uint32_t* flags,
                  void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_blocks("ternary_pack", ternary_pack_kernel<float>, rows, stream, args, flags);
    case DType::kFloat16:
      return launch_blocks("ternary_pack", ternary_pack_kernel<Half>, rows, stream, args, flags);
    case DType::kBFloat16:
      return launch_blocks("ternary_pack", ternary_pack_kernel<BFloat>, rows, stream, args, flags);
  }
}

}  // namespace pydist::cuda
