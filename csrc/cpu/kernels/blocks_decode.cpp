// decode_block and sum_block: codes and scales of one rank, or of all, to values.
#include "blocks.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

template <Put kPut>
PYDIST_INLINE void put(float* out, Vec x) {
  if (kPut == Put::kStore) store(out, x);
  if (kPut == Put::kAdd) store(out, add(load(out), x));
  if (kPut == Put::kStream) stream(out, select(greater_equal(x, x), x, set1(bits_float(kNanBits))));
}

// Values of a tile of n codes, a multiple of 32; value(codes) is that of a Vec of them.
template <Put kPut, typename Value>
PYDIST_INLINE void put_values(const unsigned char* stream, int n, int bits, const Value& value,
                              float* out) {
  if (bits == 8) {
    for (int j = 0; j < n; j += kLanes) put<kPut>(out + j, value(load_bytes(stream + j)));
    return;
  }
  for_groups(n, [&](int j, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vec codes[kGroupVecs];
    load_codes<kCount>(stream + j / 8 * bits, bits, codes);
    for (int k = 0; k * kLanes < kCount; ++k) {
      put<kPut>(out + j + k * kLanes, value(from_integers(codes[k])));
    }
  });
}

template <Put kPut>
void sign_values(const unsigned char* stream, int n, float scale, float* out) {
  const Vec minus = set1(-scale), plus = set1(scale), zero = set1(0.0f);
  const auto value = [&](Vec code) { return select(greater(code, zero), plus, minus); };
  put_values<kPut>(stream, n, 1, value, out);
}

template <Put kPut>
void level_values(const BlockFormat& f, const unsigned char* stream, int n, float scale,
                  float* out) {
  const Vec top = set1(f.top), s = set1(scale);
  const Vec high = set1(f.inverse_high), low = set1(f.inverse_low);
  const auto value = [&](Vec code) {
    const Vec q = min(sub(code, top), top);            // no encoder writes top + 1
    const Vec level = add(mul(q, high), mul(q, low));  // level_value
    return mul(level, s);
  };
  put_values<kPut>(stream, n, f.bits, value, out);
}

// As float16, which the processor widens, subnormals too: e5m2 is the upper half of it, and e4m3
// with its exponent moved is 2^-8 of its value (and its NaN 480).
template <Scheme kScheme, Put kPut>
void float8_values(const unsigned char* codes, int n, float scale, float* out) {
  constexpr bool kSmall = kScheme == Scheme::kE4M3;
  alignas(64) Half halves[kTile];
  for (int j = 0; j < n; ++j) {
    const uint32_t code = codes[j];
    halves[j].bits =
        static_cast<uint16_t>(kSmall ? (code & 0x80u) << 8 | (code & 0x7Fu) << 7 : code << 8);
  }
  const Vec s = set1(scale), unit = set1(256.0f);
  const Vec largest = set1(float8_largest(kScheme)), nan = set1(bits_float(kNanBits));
  for (int j = 0; j < n; j += kLanes) {
    Vec v = load(halves + j);
    if (kSmall) {
      v = mul(v, unit);
      v = select(greater(abs(v), largest), nan, v);
    }
    put<kPut>(out + j, mul(v, s));
  }
}

template <Put kPut>
void values_of(const BlockFormat& f, const uint8_t* codes, int n, float scale, float* out) {
  switch (f.scheme) {
    case Scheme::kSign:
      return sign_values<kPut>(codes, n, scale, out);
    case Scheme::kLevels:
      return level_values<kPut>(f, codes, n, scale, out);
    case Scheme::kE4M3:
      return float8_values<Scheme::kE4M3, kPut>(codes, n, scale, out);
    case Scheme::kE5M2:
      return float8_values<Scheme::kE5M2, kPut>(codes, n, scale, out);
  }
}

}  // namespace

template <Put kPut>
void decode_block(const BlockFormat& f, const unsigned char* codes, const unsigned char* scale,
                  int n, float* out) {
  const float s = bits_float(load_word(scale));
  for (int i = 0; i < n; i += kTile) {
    const int count = n - i < kTile ? n - i : kTile;
    const auto size = static_cast<size_t>(code_bytes(f, count));
    const unsigned char* from = codes + static_cast<int64_t>(i) * f.bits / 8;
    walks(from, size);
    if (count % 32 == 0) {
      values_of<kPut>(f, from, count, s, out + i);
      continue;
    }
    alignas(64) unsigned char stream[kTile] = {};
    copy_words(from, size, stream);
    alignas(64) float tail[kTile];
    constexpr Put kTailPut = kPut == Put::kAdd ? Put::kAdd : Put::kStore;
    if (kPut == Put::kAdd) std::memcpy(tail, out + i, count * sizeof(float));
    values_of<kTailPut>(f, stream, (count + 31) / 32 * 32, s, tail);
    std::memcpy(out + i, tail, count * sizeof(float));
  }
}

template void decode_block<Put::kStore>(const BlockFormat&, const unsigned char*,
                                        const unsigned char*, int, float*);
template void decode_block<Put::kAdd>(const BlockFormat&, const unsigned char*,
                                      const unsigned char*, int, float*);
template void decode_block<Put::kStream>(const BlockFormat&, const unsigned char*,
                                         const unsigned char*, int, float*);

void sum_block(const DecodeArgs& a, int64_t index, int n, float* out) {
  const unsigned char* codes = a.codes + index * block_bytes(a.format);
  const unsigned char* scale = a.scales + 4 * index;
  decode_block<Put::kStore>(a.format, codes, scale, n, out);
  for (int64_t r = 1; r < a.ranks; ++r) {
    decode_block<Put::kAdd>(a.format, codes + r * a.stride, scale + r * a.stride, n, out);
  }
  if (a.divisor == 1.0f) return;
  for (int i = 0; i < n; ++i) out[i] = out[i] / a.divisor;
}

}  // namespace pydist::cpu::PYDIST_ISA
