// encode_block: the scale of a block, and its codes.
#include "../simd/warp_order.h"
#include "blocks.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

float mean_scale(const float* x, int n, const BlockFormat& f, uint32_t largest) {
  const int exponent = sum_exponent(largest);
  const Vec factor = set1(power_of_two(-exponent));
  Vec sum[kWarpVecs];
  for (Vec& s : sum) s = set1(0.0f);
  if (f.norm == Norm::kL1) {
    for_rows(x, n, [&](Vec v, int k) { sum[k] = add(sum[k], abs(mul(v, factor))); });
  } else {
    for_rows(x, n, [&](Vec v, int k) {
      const Vec y = mul(v, factor);
      sum[k] = add(sum[k], mul(y, y));
    });
  }
  float total = add_lanes(sum);
  if (f.scheme == Scheme::kSign) total = total / static_cast<float>(n);
  if (f.norm == Norm::kL2) total = __builtin_sqrtf(total);
  return stored_norm(f, total * power_of_two(exponent));
}

float scale_of(const float* x, int n, const BlockFormat& f, uint32_t largest) {
  if (f.scheme >= Scheme::kE4M3) return power_of_two(float8_scale_exponent(f.scheme, largest));
  if (f.norm == Norm::kMax) return stored_norm(f, bits_float(largest));
  return mean_scale(x, n, f, largest);
}

// ------------------------------------------------------------ codes of a tile
// x has n elements, a multiple of 32; the stream of their codes goes to `out`, and nothing more.

// code(j) has the codes of the elements from j on in byte kByte of its lanes.
template <bool kBytes, int kByte, typename Code>
PYDIST_INLINE void put_groups(int n, int bits, const Code& code, unsigned char* out) {
  const CodeBits form = code_bits(bits);
  for_groups(n, [&](int j, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vec v[kGroupVecs];
    for (int k = 0; k < kGroupVecs; ++k) {
      v[k] = k * kLanes < kCount ? code(j + k * kLanes) : set1(0.0f);
    }
    const Wide codes = narrow_bytes<kByte>(v);
    if (!kBytes) {
      store_codes<kCount>(form, codes, out + j / 8 * bits);
    } else if (kCount == kGroup) {
      wide_store(out + j, codes);
    } else {
      store_fields<kCount / 8>(out + j, codes, 8);
    }
  });
}
template <int kByte = 0, typename Code>
PYDIST_INLINE void put_codes(int n, int bits, const Code& code, unsigned char* out) {
  if (bits == 8) return put_groups<true, kByte>(n, bits, code, out);
  put_groups<false, kByte>(n, bits, code, out);
}

void sign_codes(const float* x, int n, int bits, bool zero_bit, unsigned char* out) {
  const Vec one = set1(bits_float(1u)), zero = set1(0.0f);
  if (zero_bit) {
    const auto code = [&](int j) { return select(greater_equal(load(x + j), zero), one, zero); };
    return put_codes(n, bits, code, out);
  }
  const auto code = [&](int j) { return select(greater(load(x + j), zero), one, zero); };
  put_codes(n, bits, code, out);
}

void nearest_codes(const float* x, int n, int bits, float factor, float top, unsigned char* out) {
  const Vec f = set1(factor), high = set1(top), low = set1(-top), magic = set1(kRoundingMagic);
  const auto code = [&](int j) {
    const Vec t = max(min(mul(load(x + j), f), high), low);
    return add(add(t, magic), high);
  };
  put_codes(n, bits, code, out);
}

// A level a goes up where the draw is below the 16 bits behind its point, and what is behind those:
// q = floor((ceil(2^16 a) + 65535 - draw) / 2^16). As integers of 24 bits, q is the third byte; so
// is top + q, and top - q = floor((2^16 top - ceil(2^16 a) + draw) / 2^16).
void stochastic_codes(const float* x, int n, int bits, float factor, float top,
                      const uint16_t* draws, unsigned char* out) {
  const Vec f = set1(factor), high = set1(top);
  const uint32_t middle = static_cast<uint32_t>(top) << 16;
  const Vec negative = set1(bits_float(middle)), positive = set1(bits_float(middle + 0xFFFFu));
  const auto code = [&](int j) {
    const Vec v = load(x + j);
    const Vec a = min(mul(abs(v), f), high);
    const Vec q = sub_bits(ceil_bits(a), load_half_bits(draws + j));
    return select(sign_bit(v), sub_bits(negative, q), add_bits(positive, q));
  };
  put_codes<2>(n, bits, code, out);
}

template <Scheme kScheme>
void float8_codes(const float* x, int n, float factor, unsigned char* out) {
  const Vec f = set1(factor), high = set1(float8_largest(kScheme));
  const Vec low = set1(-float8_largest(kScheme));
  alignas(64) float scaled[kTile];
  for (int j = 0; j < n; j += kLanes) {
    store(scaled + j, max(min(mul(load(x + j), f), high), low));
  }
  for (int j = 0; j < n; ++j) out[j] = static_cast<uint8_t>(float8_code(kScheme, scaled[j]));
}

// As many `bits` a code as the format has, or 8: a byte each.
void codes_of(const float* x, int n, const EncodeArgs& a, float scale, const WidePhilox& philox,
              int64_t first, int bits, unsigned char* out) {
  const BlockFormat& f = a.format;
  switch (f.scheme) {
    case Scheme::kSign:
      return sign_codes(x, n, bits, a.zero_bit != 0, out);
    case Scheme::kLevels:
      if (f.stochastic) {
        DrawBuffer<kTile> draws;
        return stochastic_codes(x, n, bits, level_factor(f, scale), f.top,
                                draws.fill(philox, first, n), out);
      }
      return nearest_codes(x, n, bits, level_factor(f, scale), f.top, out);
    case Scheme::kE4M3:
      return float8_codes<Scheme::kE4M3>(x, n, 1.0f / scale, out);
    case Scheme::kE5M2:
      return float8_codes<Scheme::kE5M2>(x, n, 1.0f / scale, out);
  }
}

// A tile of n elements that are no multiple of 32: as if zeros followed, whose codes are zeros.
void tail_codes(const float* x, int n, const EncodeArgs& a, float scale, const WidePhilox& philox,
                int64_t first, unsigned char* out) {
  const int padded = (n + 31) / 32 * 32;
  alignas(64) float room[kTile] = {};
  std::memcpy(room, x, n * sizeof(float));
  alignas(64) uint8_t codes[kTile];
  codes_of(room, padded, a, scale, philox, first, 8, codes);
  std::memset(codes + n, 0, padded - n);
  alignas(64) unsigned char stream[kTile];
  pack_codes(codes, padded, a.format.bits, stream);
  copy_words(stream, static_cast<size_t>(code_bytes(a.format, n)), out);
}

}  // namespace

uint32_t encode_block(const float* x, uint32_t largest, const BlockPlace& place,
                      const EncodeArgs& a, const WidePhilox& philox) {
  const BlockFormat& f = a.format;
  const int64_t begin = place.index * block_bytes(f);
  unsigned char* out = a.codes + begin;
  const int64_t room = a.code_bytes - begin < block_bytes(f) ? a.code_bytes - begin
                                                             : block_bytes(f);  // with padding
  const bool finite = largest < kInfBits;
  const float scale = finite ? scale_of(x, place.n, f, largest) : bits_float(kNanBits);
  store_word(a.scales + 4 * place.index, float_bits(scale));
  int64_t written = 0;
  for (int i = 0; finite && i < place.n; i += kTile) {
    const int n = place.n - i < kTile ? place.n - i : kTile;
    if (n % 32) {
      tail_codes(x + i, n, a, scale, philox, place.first + i, out + written);
    } else {
      codes_of(x + i, n, a, scale, philox, place.first + i, f.bits, out + written);
    }
    written += code_bytes(f, n);
  }
  if (written < room) std::memset(out + written, 0, room - written);
  return finite ? 0u : kFlagNonFinite;
}

}  // namespace pydist::cpu::PYDIST_ISA
