// ternary_pack: values as trits, five to a byte.
//
// A warp takes eight units: a lane takes 8 of the 32 bytes of a unit, which are five runs of eight
// consecutive elements, a Philox group each.
#include "../../wire/ternary.h"
#include "blocks.cuh"

namespace pydist::cuda {
namespace {

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
