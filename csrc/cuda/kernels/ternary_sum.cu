// ternary_sum, ternary_unpack, ternary_unpack_sums: trits of all ranks to their exact sums, sums to
// bit planes and back, sums to values.
//
// A warp takes a unit: lane k has byte k of every rank, whose five digits are elements k, k + 32,
// …, so that a ballot is a word of a bit plane and values are written in whole lines.
#include "../../wire/ternary.h"
#include "blocks.cuh"

namespace pydist::cuda {
namespace {

using Sums = int32_t[kDigits];

// What this lane's bytes of a unit add up to. A malformed byte is five zeros, and is told of.
PYDIST_DEVICE void sum_unit(const TernarySource& a, int64_t unit, int lane, Sums& sums, bool* bad) {
  const int64_t at = unit * kUnitBytes + lane;
  const bool there = at < a.bytes;
#pragma unroll
  for (int i = 0; i < kDigits; ++i) sums[i] = 0;
#pragma unroll 4
  for (int64_t r = 0; r < a.ranks; ++r) {
    uint32_t rest = there ? a.data[r * a.stride + at] : 0u;
    if (rest > kLargestByte) rest = 0, *bad = true;
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      const uint32_t quotient = (rest * 171) >> 9;  // by 3, below 512
      const uint32_t digit = rest - 3 * quotient;
      sums[i] += static_cast<int32_t>(digit & 1u) - static_cast<int32_t>(digit >> 1);
      rest = quotient;
    }
  }
}

__global__ void __launch_bounds__(kBlockThreads, 4)
    ternary_sum_kernel(Rows rows, TernarySource a, unsigned char* out, uint32_t* flags) {
  const int lane = lane_id(), words = sum_bits(a.ranks) * kPlaneWords;
  bool bad = false;
  for_blocks(rows, kUnit, [&](const Row&, int64_t unit, int64_t, int) {
    Sums sums;
    sum_unit(a, unit, lane, sums, &bad);
    unsigned char* planes = out + unit * words * 4;
    uint32_t mine = 0;  // of 32 words one a lane
#pragma unroll 1
    for (int first = 0, plane = 0; first < words; first += kPlaneWords, ++plane) {
#pragma unroll
      for (int i = 0; i < kDigits; ++i) {
        const int word = first + i;
        const uint32_t bits = __ballot_sync(kAllLanes, ((sums[i] >> plane) & 1) != 0);
        if (lane == word % kWarpSize) mine = bits;
        if (word % kWarpSize == kWarpSize - 1 || word == words - 1) {
          const int begin = word - word % kWarpSize;
          if (begin + lane <= word) store_word(planes + 4 * (begin + lane), mine);
        }
      }
    }
  });
  raise_flags(flags, bad, kFlagMalformed);
}

// The values of a lane's sums, as T. Tells of one that is not finite as float32.
template <typename T>
PYDIST_DEVICE void put_values(const Sums& sums, const Row& row, int64_t begin, int n, int lane,
                              float divisor, bool* finite) {
  const float scaler = bits_float(load_word(device_pointer<unsigned char>(row.momentum_out)));
  T* out = device_pointer<T>(row.x) + begin;
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
    const int at = i * kUnitBytes + lane;
    const float value = trit_value(scaler, sums[i], divisor);
    if (at < n) {
      narrow(value, out + at);
      *finite = *finite && (float_bits(value) & kAbsMask) < kInfBits;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    ternary_unpack_kernel(Rows rows, TernarySource a, uint32_t* flags) {
  const int lane = lane_id();
  bool bad = false, finite = true;
  for_blocks(rows, kUnit, [&](const Row& row, int64_t unit, int64_t begin, int n) {
    Sums sums;
    sum_unit(a, unit, lane, sums, &bad);
    put_values<T>(sums, row, begin, n, lane, a.divisor, &finite);
  });
  raise_flags(flags, bad, kFlagMalformed);
  raise_flags(flags, !finite);
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    ternary_unpack_sums_kernel(Rows rows, TernarySource a, uint32_t* flags) {
  const int lane = lane_id(), bits = sum_bits(a.ranks);
  const auto ranks = static_cast<int32_t>(a.ranks);
  bool bad = false, finite = true;
  for_blocks(rows, kUnit, [&](const Row& row, int64_t unit, int64_t begin, int n) {
    const unsigned char* planes = a.data + unit * bits * kPlaneWords * 4;
    Sums sums;
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      uint32_t field = 0;
#pragma unroll 1
      for (int plane = 0; plane < bits; ++plane) {  // one word for all lanes
        const uint32_t word = load_word(planes + 4 * (plane * kPlaneWords + i));
        field |= ((word >> lane) & 1u) << plane;
      }
      const uint32_t sign = 1u << (bits - 1);
      const auto sum = static_cast<int32_t>((field ^ sign) - sign);
      const bool wrong = sum > ranks || sum < -ranks;
      sums[i] = wrong ? 0 : sum;
      bad = bad || wrong;
    }
    put_values<T>(sums, row, begin, n, lane, a.divisor, &finite);
  });
  raise_flags(flags, bad, kFlagMalformed);
  raise_flags(flags, !finite);
}

}  // namespace

void ternary_sum(const Rows& rows, const TernarySource& from, unsigned char* out, uint32_t* flags,
                 void* stream) {
  launch_blocks("ternary_sum", ternary_sum_kernel, rows, stream, from, out, flags);
}

void ternary_unpack(const Rows& rows, DType dtype, const TernarySource& from, uint32_t* flags,
                    void* stream) {
  constexpr const char* kName = "ternary_unpack";
  switch (dtype) {
    case DType::kFloat32:
      return launch_blocks(kName, ternary_unpack_kernel<float>, rows, stream, from, flags);
    case DType::kFloat16:
      return launch_blocks(kName, ternary_unpack_kernel<Half>, rows, stream, from, flags);
    case DType::kBFloat16:
      return launch_blocks(kName, ternary_unpack_kernel<BFloat>, rows, stream, from, flags);
  }
}

void ternary_unpack_sums(const Rows& rows, DType dtype, const TernarySource& from, uint32_t* flags,
                         void* stream) {
  constexpr const char* kName = "ternary_unpack_sums";
  switch (dtype) {
    case DType::kFloat32:
      return launch_blocks(kName, ternary_unpack_sums_kernel<float>, rows, stream, from, flags);
    case DType::kFloat16:
      return launch_blocks(kName, ternary_unpack_sums_kernel<Half>, rows, stream, from, flags);
    case DType::kBFloat16:
      return launch_blocks(kName, ternary_unpack_sums_kernel<BFloat>, rows, stream, from, flags);
  }
}

}  // namespace pydist::cuda
