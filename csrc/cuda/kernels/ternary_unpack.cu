// ternary_unpack and ternary_unpack_sums: values of the sums of trits, from all ranks' trits or
// from the bit planes of their sums.
#include "../division.cuh"
#include "ternary.cuh"

namespace pydist::cuda {
namespace {

// What comes to light about a warp's elements.
struct Found {
  bool malformed, infinite;
  uint32_t wrong;  // bit 0: a sum that can't be
};

PYDIST_DEVICE bool is_finite(float x) { return (float_bits(x) & kAbsMask) < kInfBits; }

// ------------------------------------------------------------ narrow sums

// The values of sums -16 ... 15, one a lane: sum s is on lane s modulo 32.
template <typename T>
struct Levels {
  uint32_t bits;             // this lane's, as T
  uint32_t wrong, infinite;  // masks of sums that can't be, and of those that are not finite

  PYDIST_DEVICE_MEMBER Levels(float scaler, const Divisor& d, int ranks, int lane) {
    const int sum = (lane ^ 16) - 16;
    const bool possible = sum <= ranks && sum >= -ranks;
    const float value = scaler * divided(static_cast<float>(possible ? sum : 0), d);
    T stored;
    narrow(value, &stored);
    put(&bits, 0, stored);
    wrong = __ballot_sync(kAllLanes, !possible);
    infinite = __ballot_sync(kAllLanes, !is_finite(value));
  }
};

// Which of 32 sums a field says, which may have other fields above it, as a bit of `mask`: in bit
// 0.
PYDIST_DEVICE uint32_t looked_up(uint32_t mask, uint32_t field) {
  return __funnelshift_r(mask, mask, field);  // by the field modulo 32
}

// Whether one of a lane's elements below n has a sum in `mask`.
PYDIST_DEVICE bool any_sum_in(uint32_t mask, const Fields& fields, int n, int lane) {
  uint32_t found = 0;
#pragma unroll 1
  for (int i = 0; i < kDigits; ++i) {
#pragma unroll
    for (int b = 0; b < kLaneBytes; ++b) {
      const bool there = i * kUnitBytes + kLaneBytes * (lane % kLanesAUnit) + b < n;
      found |= there ? looked_up(mask, fields[b] >> (kFieldBits * i)) : 0u;
    }
  }
  return (found & 1u) != 0;
}

// x[0, 4) = the low bits of four words, as T.
template <typename T>
PYDIST_DEVICE void store_four(T* x, const uint32_t (&bits)[kLaneBytes]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<uint4*>(x) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
  } else {
    *reinterpret_cast<uint2*>(x) =
        make_uint2(__byte_perm(bits[0], bits[1], 0x5410u), __byte_perm(bits[2], bits[3], 0x5410u));
  }
}

// Stores the elements of a unit below n, of which this lane has four consecutive ones of each
// digit; kWhole: all units of the step are whole, and aligned. All lanes call it together.
template <typename T, bool kFromSums, bool kWhole>
PYDIST_DEVICE void put_fields(const Fields& fields, const Levels<T>& levels, T* out, int n,
                              int lane, Found* found) {
  const int first = kLaneBytes * (lane % kLanesAUnit);
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
    const int at = i * kUnitBytes + first;
    uint32_t bits[kLaneBytes];
#pragma unroll
    for (int b = 0; b < kLaneBytes; ++b) {
      const uint32_t field = fields[b] >> (kFieldBits * i);
      bits[b] = __shfl_sync(kAllLanes, levels.bits, static_cast<int>(field));
      if (kFromSums) found->wrong |= looked_up(levels.wrong, field);
    }
    if constexpr (kWhole) {
      store_four(out + at, bits);
    } else {
#pragma unroll
      for (int b = 0; b < kLaneBytes; ++b) {
        if (at + b < n) take(&bits[b], 0, out + at + b);
      }
    }
  }
  if (levels.infinite && any_sum_in(levels.infinite, fields, n, lane)) found->infinite = true;
}

// The fields of a lane's bytes from the bit planes of their unit: what ternary_sum does, backwards.
// Fields have more bits than there may be planes; the last is the sign.
PYDIST_DEVICE void load_fields(const TernarySource& a, bool even, const PlanePlaces& places,
                               int64_t unit, bool there, int lane, Fields& fields) {
  const unsigned char* sums = a.data + unit * places.unit_bytes;
#pragma unroll
  for (int j = 0; j < kLaneBytes; ++j) fields[j] = 0;
  if (even) {  // one branch for all loads
#pragma unroll
    for (int j = 0; j < kLaneBytes; ++j) {
      const auto* p = reinterpret_cast<const uint32_t*>(sums + places.at[j]);
      if (there && places.at[j] >= 0) fields[j] = *p;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLaneBytes; ++j) {
      if (there && places.at[j] >= 0) fields[j] = load_word_bytes(sums + places.at[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kLaneBytes; ++j) fields[j] = transpose_bits<kNibble>(fields[j], lane);
  transpose_nibbles(fields);
}

template <typename T, bool kFromSums>
PYDIST_DEVICE void unpack_narrow(const TernarySource& a, bool even, const uint32_t* table,
                                 const PlanePlaces& places, const Levels<T>& levels, const Row& row,
                                 int64_t first, int64_t begin, int n, int lane, Found* found) {
  const bool vector = aligned<16>(row.x);
  uint32_t seen = 0;
#pragma unroll 1
  for (int step = 0; step * kUnit < n; step += kStepUnits) {
    const int unit = step + lane / kLanesAUnit, rest = n - unit * kUnit;
    Fields fields;
    if constexpr (kFromSums) {
      load_fields(a, even, places, first + unit, rest > 0, lane, fields);
    } else {
      sum_fields(a, even, table, first + unit, rest > 0, lane, fields, &seen);
    }
    // Bytes are added before it is a pointer: nvcc 13.0 would else store word by word.
    T* out = device_pointer<T>(row.x + (begin + unit * kUnit) * static_cast<int64_t>(sizeof(T)));
    if (vector && (step + kStepUnits) * kUnit <= n) {
      put_fields<T, kFromSums, true>(fields, levels, out, rest, lane, found);
    } else {
      put_fields<T, kFromSums, false>(fields, levels, out, rest, lane, found);
    }
  }
  found->malformed = found->malformed || (seen & kMalformed) != 0;
}

// ------------------------------------------------------------ wide sums

// What a lane's digits add up to, from the planes of a unit.
PYDIST_DEVICE void load_sums(const TernarySource& a, int64_t unit, int lane, Sums& sums,
                             bool* bad) {
  const int planes = sum_bits(a.ranks);
  const unsigned char* words = a.data + unit * sum_unit_bytes(a.ranks);
  const auto ranks = static_cast<int32_t>(a.ranks);
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
    uint32_t field = 0;
#pragma unroll 1
    for (int plane = 0; plane < planes; ++plane) {  // one word for all lanes
      const uint32_t word = load_word(words + 4 * (plane * kPlaneWords + i));
      field |= ((word >> lane) & 1u) << plane;
    }
    const uint32_t sign = 1u << (planes - 1);
    const auto sum = static_cast<int32_t>((field ^ sign) - sign);
    const bool wrong = sum > ranks || sum < -ranks;
    sums[i] = wrong ? 0 : sum;
    *bad = *bad || wrong;
  }
}

template <typename T, bool kFromSums>
PYDIST_DEVICE void unpack_wide(const TernarySource& a, float scaler, const Divisor& d, int64_t unit,
                               T* out, int n, int lane, Found* found) {
  Sums sums;
  if constexpr (kFromSums) {
    load_sums(a, unit, lane, sums, &found->malformed);
  } else {
    sum_unit(a, unit, lane, sums, &found->malformed);
  }
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
    const int at = i * kUnitBytes + lane;
    const float value = scaler * divided(static_cast<float>(sums[i]), d);
    if (at >= n) continue;
    narrow(value, out + at);
    found->infinite = found->infinite || !is_finite(value);
  }
}

// ------------------------------------------------------------ kernels

template <typename T, bool kFromSums>
__global__ void __launch_bounds__(kBlockThreads, 3)
    ternary_unpack_kernel(Rows rows, TernarySource a, uint32_t* flags) {
  __shared__ uint32_t table[kBlockThreads];
  if (!kFromSums) fill_table(table);
  const int lane = lane_id();
  const Divisor d(a.divisor);
  const bool even = aligned<4>(reinterpret_cast<int64_t>(a.data) | (kFromSums ? 0 : a.stride));
  const PlanePlaces places(a.ranks, lane);
  Found found = {false, false, 0};
  for_units(rows, [&](const Row& row, int64_t first, int64_t begin, int n) {
    const TernarySource here = in_message(a, row);
    const float scaler = bits_float(load_word(device_pointer<unsigned char>(row.momentum_out)));
    if (a.ranks <= kNarrowRanks) {
      const Levels<T> levels(scaler, d, static_cast<int>(a.ranks), lane);
      unpack_narrow<T, kFromSums>(here, even, table, places, levels, row, first, begin, n, lane,
                                  &found);
      return;
    }
    T* out = device_pointer<T>(row.x) + begin;
#pragma unroll 1
    for (int done = 0; done < n; done += kUnit) {
      unpack_wide<T, kFromSums>(here, scaler, d, first + done / kUnit, out + done, n - done, lane,
                                &found);
    }
  });
  raise_flags(flags, found.malformed || (found.wrong & 1u) != 0, kFlagMalformed);
  raise_flags(flags, found.infinite);
}

template <bool kFromSums>
void launch_unpack(const char* name, const Rows& rows, DType dtype, const TernarySource& from,
                   uint32_t* flags, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_blocks(name, ternary_unpack_kernel<float, kFromSums>, rows, stream, from,
                           flags);
    case DType::kFloat16:
      return launch_blocks(name, ternary_unpack_kernel<Half, kFromSums>, rows, stream, from, flags);
    case DType::kBFloat16:
      return launch_blocks(name, ternary_unpack_kernel<BFloat, kFromSums>, rows, stream, from,
                           flags);
  }
}

}  // namespace

void ternary_unpack(const Rows& rows, DType dtype, const TernarySource& from, uint32_t* flags,
                    void* stream) {
  launch_unpack<false>("ternary_unpack", rows, dtype, from, flags, stream);
}

void ternary_unpack_sums(const Rows& rows, DType dtype, const TernarySource& from, uint32_t* flags,
                         void* stream) {
  launch_unpack<true>("ternary_unpack_sums", rows, dtype, from, flags, stream);
}

}  // namespace pydist::cuda
