// ternary_pack: values as trits, five to a byte.
//
// A warp takes eight units at a time, a lane 8 of the 32 bytes of a unit: five runs of eight
// consecutive elements, a Philox group each.
#include "ternary.cuh"

namespace pydist::cuda {
namespace {

constexpr int kLanesPacking = kUnitBytes / kRun;  // of a unit
constexpr int kUnitsPacking = kWarpSize / kLanesPacking;

// A draw of 16 bits as a float: two bytes below the exponent of 2^23, whose ulp is 1.
PYDIST_DEVICE float draw_value(const Philox4& draws, int j) {
  constexpr uint32_t kMagic = 0x4B000000u;  // 2^23
  const uint32_t bytes = j % 2 ? 0x7632u : 0x7610u;
  return bits_float(__byte_perm(draws.v[j / 2], kMagic, bytes)) - bits_float(kMagic);
}

// The highest bytes of four floats.
PYDIST_DEVICE uint32_t high_bytes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(float_bits(a), float_bits(b), 0x73u);
  const uint32_t high = __byte_perm(float_bits(c), float_bits(d), 0x73u);
  return __byte_perm(low, high, 0x5410u);
}

// Four digits of eight, a byte each: 0 for zero, 1 for plus, 2 for minus. An element is not zero
// where held * factor > draw; that is where their difference has a sign, rounded or not.
template <int kFrom>
PYDIST_DEVICE uint32_t four_digits(const Run& v, const TritScale& s, const Philox4& draws) {
  constexpr uint32_t kSigns = 0x80808080u;
  float below[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float held = fminf(fabsf(v[kFrom + j]), s.limit);
    below[j] = draw_value(draws, kFrom + j) - held * s.factor;
  }
  const uint32_t hit = high_bytes(below[0], below[1], below[2], below[3]) & kSigns;
  const uint32_t minus = high_bytes(v[kFrom], v[kFrom + 1], v[kFrom + 2], v[kFrom + 3]) & hit;
  return (hit >> 7) + (minus >> 7);
}

// A lane's eight bytes of a unit, of elements i + 32 * digit + 0 … 7, all there and all finite:
// their magnitudes are added to *sum, which then is finite, too. All loads are in flight at once.
// `group` is the Philox group of element i.
template <typename T>
PYDIST_DEVICE uint2 pack_whole(const T* x, int i, const DrawKey& key, uint64_t group,
                               const TritScale& scale, float* sum) {
  T raw[kDigits][kRun];
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit) {
    load_run<T, kRun, true>(x, i + digit * kUnitBytes, 0, raw[digit]);
  }
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    Run v;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      v[j] = widen(raw[digit][j]);
      *sum = *sum + fabsf(v[j]);
    }
    const Philox4 draws = draw_group(key, group + static_cast<uint64_t>(digit * kUnitBytes / kRun));
    low = 3 * low + four_digits<0>(v, scale, draws);  // no byte overflows: 80 * 3 + 2 is 242
    high = 3 * high + four_digits<4>(v, scale, draws);
  }
  return make_uint2(low, high);
}

// The same of elements below n, wherever they are; what is above, or not finite, counts as zero.
template <typename T>
PYDIST_DEVICE uint2 pack_any(const T* x, int i, int n, const DrawKey& key, uint64_t element,
                             const TritScale& scale, bool* finite) {
  uint32_t low = 0, high = 0;
#pragma unroll 1
  for (int at = (kDigits - 1) * kUnitBytes; at >= 0; at -= kUnitBytes) {
    T raw[kRun];
    load_run<T, kRun, false>(x, i + at, n, raw);
    Run v;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      v[j] = widen(raw[j]);
      const bool good = (float_bits(v[j]) & kAbsMask) < kInfBits;
      *finite = *finite && good;
      v[j] = good ? v[j] : 0.0f;
    }
    const Philox4 draws = draw_bits(key, (element + static_cast<uint64_t>(at)) * 16);
    low = 3 * low + four_digits<0>(v, scale, draws);
    high = 3 * high + four_digits<4>(v, scale, draws);
  }
  return make_uint2(low, high);
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 3)
    ternary_pack_kernel(Rows rows, TernaryPackArgs a, uint32_t* flags) {
  const int lane = lane_id(), byte = kRun * (lane % kLanesPacking);
  const auto step = static_cast<uint32_t>(step_of(a));
  bool finite = true;
  for_units(rows, [&](const Row& row, int64_t first, int64_t begin, int n) {
    const TritScale scale =
        trit_scale(bits_float(load_word(device_pointer<unsigned char>(row.momentum))),
                   bits_float(load_word(device_pointer<unsigned char>(row.momentum_out))));
    const DrawKey key = {a.seed, a.key1, step, static_cast<uint32_t>(row.ordinal)};
    const T* x = device_pointer<T>(row.x) + begin;
    const bool vector = aligned<16>(row.x) && row.first % kRun == 0;
#pragma unroll 1
    for (int unit = lane / kLanesPacking; unit * kUnit < n; unit += kUnitsPacking) {
      const int i = unit * kUnit + byte;
      const auto element = static_cast<uint64_t>(row.first + begin + i);
      float sum = bits_float(kInfBits);
      uint2 bytes = {};
      if (vector && (unit + 1) * kUnit <= n) {
        sum = 0.0f;
        bytes = pack_whole(x, i, key, element / kRun, scale, &sum);
      }
      if (!(sum < bits_float(kInfBits))) {  // too large a sum may be finite elements', too
        bytes = pack_any(x, i, n, key, element, scale, &finite);
      }
      const int64_t at = (first + unit) * kUnitBytes + byte;
      if (at < a.bytes) store_word(a.payload + row.message + at, bytes.x);
      if (at + 4 < a.bytes) store_word(a.payload + row.message + at + 4, bytes.y);
    }
  });
  raise_flags(flags, !finite);
}

}  // namespace

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
