// ternary_pack: values to trits, at random and so that their expectation stays; five to a byte.
#include "../simd/convert.h"
#include "../simd/philox.h"
#include "../table.h"
#include "ternary.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

// Digits of x[0, n), a byte each: 0 for zero, 1 for plus, 2 for minus. n is a multiple of 32.
PYDIST_INLINE void digits_of(const float* x, int n, const TritScale& scale, const uint16_t* draws,
                             uint8_t* digits, Mask* finite) {
  const Vec limit = set1(scale.limit), factor = set1(scale.factor), zero = set1(0.0f);
  const Vec plus = set1(bits_float(1u)), minus = set1(bits_float(2u));
  for (int j = 0; j < n; j += kLanes) {
    const Vec v = load(x + j);
    const Mask good = abs_below(v, kInfBits);
    const Vec a = select(good, min(abs(v), limit), zero);
    const Mask hit = greater(mul(a, factor), load_halves(draws + j));
    store_low_bytes(digits + j, select(hit, select(greater(zero, v), minus, plus), zero));
    *finite = both(*finite, good);
  }
}

PYDIST_INLINE void pack_unit(const uint8_t* d, unsigned char* bytes) {
  for (int k = 0; k < kUnitBytes; ++k) {
    uint8_t byte = d[k + 4 * kUnitBytes];
    for (int i = kDigits - 2; i >= 0; --i) {
      byte = static_cast<uint8_t>(3 * byte + d[k + i * kUnitBytes]);
    }
    bytes[k] = byte;
  }
}

}  // namespace

template <typename T>
uint32_t ternary_pack(const Row& row, const TernaryPackArgs& a) {
  const T* x = reinterpret_cast<const T*>(row.x);
  const WidePhilox philox({a.seed, a.key1, a.step, static_cast<uint32_t>(row.ordinal)});
  const TritScale scale = trit_scale(scaler_at(row.momentum), scaler_at(row.momentum_out));
  Mask finite = mask_from(kLaneMask);
  for (int64_t i = 0; i < row.n; i += kUnitsTile) {
    const int n = static_cast<int>(row.n - i < kUnitsTile ? row.n - i : kUnitsTile);
    const int units = (n + kUnit - 1) / kUnit;
    alignas(64) float room[kUnitsTile];
    const float* from = widened(x + i, n, room);
    if (n < units * kUnit) {
      if (from != room) std::memcpy(room, from, n * sizeof(float));
      std::memset(room + n, 0, (units * kUnit - n) * sizeof(float));
      from = room;
    }
    DrawBuffer<kUnitsTile> draws;
    alignas(64) uint8_t digits[kUnitsTile];
    digits_of(from, units * kUnit, scale, draws.fill(philox, row.first + i, units * kUnit), digits,
              &finite);
    alignas(64) unsigned char bytes[kUnitsTile / kDigits];
    for (int u = 0; u < units; ++u) pack_unit(digits + u * kUnit, bytes + u * kUnitBytes);
    const int64_t begin = (row.word + i / kUnit) * kUnitBytes;
    const int64_t size = units * kUnitBytes;
    std::memcpy(a.payload + begin, bytes, a.bytes - begin < size ? a.bytes - begin : size);
  }
  return bits_of(finite) == kLaneMask ? 0u : kFlagNonFinite;
}

template uint32_t ternary_pack<float>(const Row&, const TernaryPackArgs&);
template uint32_t ternary_pack<Half>(const Row&, const TernaryPackArgs&);
template uint32_t ternary_pack<BFloat>(const Row&, const TernaryPackArgs&);

}  // namespace pydist::cpu::PYDIST_ISA
