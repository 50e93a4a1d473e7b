// Codes of block formats in runs of eight: to bytes and back, from values and back. What differs
// between formats is decided once a run, and is the same for all lanes.
#pragma once

#include "blocks.cuh"

namespace pydist::cuda {

// The codes of a run: four in each word, the first in the lowest bits. Above the four, `decode`
// ignores what there is, and `store_codes` wants zeros.
struct Codes {
  uint32_t low, high;
};

// ------------------------------------------------------------ bytes

// The unit that a payload may be read and written in: 8, 4 or 1 bytes, from its addresses.
PYDIST_DEVICE int unit_of(int64_t addresses) {
  return aligned<8>(addresses) ? 8 : aligned<4>(addresses) ? 4 : 1;
}
template <typename T>
PYDIST_DEVICE int64_t address_of(const T* p) {
  return reinterpret_cast<int64_t>(p);
}

// Whether runs never straddle two words.
PYDIST_DEVICE bool one_word(int bits) { return bits == 4 || bits <= 2; }

// A run as it was loaded: nothing waits for the memory before the codes are asked for. One word is
// enough where runs never straddle two.
template <int kWords>
struct Packed {
  uint32_t words[kWords];

  // `shift`: bits before the first code.
  PYDIST_DEVICE_MEMBER Codes codes(int bits, int shift) const {
    if constexpr (kWords == 1) {
      const uint32_t low = words[0] >> shift;
      return {low, low >> (4 * bits)};
    } else if constexpr (kWords == 2) {
      return {words[0], words[1]};
    } else {
      if (bits == 8) return {words[0], words[1]};
      const uint32_t low = __funnelshift_r(words[0], words[1], shift);
      if (bits <= 4) return {low, low >> (4 * bits)};
      const uint32_t high = __funnelshift_r(words[1], words[2], shift);
      return {low, __funnelshift_r(low, high, 4 * bits)};
    }
  }
};

// A run of `bytes` bytes from p on, or in words: of those behind the `before` bytes at p. All words
// that these are in may be read.
template <int kWords>
PYDIST_DEVICE Packed<kWords> load_bytes(const unsigned char* p, int bytes) {
  Packed<kWords> run = {};
#pragma unroll
  for (int b = 0; b < (kWords == 1 ? 4 : 8); ++b) {
    if (b < bytes) run.words[b / 4] |= static_cast<uint32_t>(p[b]) << (b % 4 * 8);
  }
  return run;
}
template <int kWords, bool kWhole>
PYDIST_DEVICE Packed<kWords> load_words(const unsigned char* p, int before, int bytes) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(p);
  Packed<kWords> run = {};
  if (kWhole || bytes > 0) run.words[0] = words[0];
#pragma unroll
  for (int w = 1; w < kWords; ++w) {
    if (kWords == 2 || before + bytes > 4 * w) run.words[w] = words[w];
  }
  return run;
}

// kWords: they may be written in words.
template <bool kWords>
PYDIST_DEVICE void store_codes(unsigned char* p, int bits, int unit, int room, Codes codes) {
  if (bits == 4 && (kWords || unit > 1) && room >= 4) {
    *reinterpret_cast<uint32_t*>(p) = codes.low | codes.high << 16;
  } else if (bits == 8 && unit == 8 && room >= 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(codes.low, codes.high);
  } else {
    const uint64_t all = codes.low | static_cast<uint64_t>(codes.high) << (4 * bits);
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      if (b < bits && b < room) p[b] = static_cast<unsigned char>(all >> (8 * b));
    }
  }
}

// The first n (0 ... 8) of a run; zeros for the others.
PYDIST_DEVICE Codes first_codes(Codes codes, int bits, int n) {
  const int in_low = n < 4 ? n : 4;
  codes.low &= static_cast<uint32_t>((uint64_t{1} << (in_low * bits)) - 1);
  codes.high &= static_cast<uint32_t>((uint64_t{1} << ((n - in_low) * bits)) - 1);
  return codes;
}

// ------------------------------------------------------------ encoding

// What all runs of a launch share.
struct Encoder {
  Scheme scheme;
  Norm norm;
  int bits;
  float top;
  uint32_t weight;  // of a code among those of a run, to that before it
  uint32_t bias;    // what four levels hold too much
  float threshold;  // signs of numbers above it are ones

  PYDIST_DEVICE_MEMBER explicit Encoder(const EncodeArgs& a)
      : scheme(a.format.scheme),
        norm(a.format.norm),
        bits(afresh(a.format.bits)),
        top(a.format.top),
        weight(afresh(1u << bits)),  // a product is one instruction, a shift and a sum are two
        bias((float_bits(kRoundingMagic) - static_cast<uint32_t>(static_cast<int>(top))) *
             (1 + weight + weight * weight + weight * weight * weight)),
        threshold(a.zero_bit ? bits_float(0x80000001u) : 0.0f) {}  // zero lies above -2^-149

  // Four codes in a word, by Horner's rule; `code` may have more in its upper bits, all told
  // `extra`.
  template <typename Code>
  PYDIST_DEVICE_MEMBER Codes pack(uint32_t extra, const Code& code) const {
    Codes codes = {code(3), code(7)};
#pragma unroll
    for (int j = 2; j >= 0; --j) {
      codes.low = codes.low * weight + code(j);
      codes.high = codes.high * weight + code(4 + j);
    }
    return {codes.low - extra, codes.high - extra};
  }

  // Levels of the nearest integers. The sum of the magic number and t holds t's in its low bits,
  // and the bits above them are the same in every code. No clamp: |x| is at most the norm but for
  // its rounding, so that t is below top + 1/2.
  PYDIST_DEVICE_MEMBER Codes nearest(const Run& v, float factor) const {
    return pack(bias, [&](int j) { return float_bits(v[j] * factor + kRoundingMagic); });
  }

  // A level a goes up where the draw is below the 16 bits behind its point, and what is behind
  // those: q = floor((ceil(2^16 a) + 65535 - draw) / 2^16), and in integers of 24 bits top + q and
  // top - q are the third byte. Adding 2^23, rounded up, leaves the ceiling in the low bits.
  PYDIST_DEVICE_MEMBER Codes stochastic(const Run& v, float factor, const Philox4& draws) const {
    constexpr float kMagic = 8388608.0f;
    const uint32_t middle = static_cast<uint32_t>(static_cast<int>(top)) << 16;
    return pack(0, [&](int j) {
      const float a = fminf(fabsf(v[j]) * factor, top);
      const uint32_t up = float_bits(__fmaf_ru(a, 65536.0f, kMagic)) - float_bits(kMagic);
      const uint32_t q = up - draw16(draws, j);
      return (float_bits(v[j]) >> 31 ? middle - q : middle + 0xFFFFu + q) >> 16;
    });
  }

  template <int kMantissa, int kBias>
  PYDIST_DEVICE_MEMBER Codes floats(const Run& v, float factor) const {
    const float most = float8_largest(scheme);
    return pack(0, [&](int j) {
      return float8_code_of<kMantissa, kBias>(fmaxf(fminf(v[j] * factor, most), -most));
    });
  }

  template <bool kStochastic>
  PYDIST_DEVICE_MEMBER Codes encode(const Run& v, float factor, const Philox4& draws) const {
    if (kStochastic) return stochastic(v, factor, draws);
    if (scheme == Scheme::kLevels) return nearest(v, factor);
    const Scheme other = static_cast<Scheme>(afresh(static_cast<int>(scheme)));  // no jump table
    if (other == Scheme::kE4M3) return floats<3, 7>(v, factor);
    if (other == Scheme::kE5M2) return floats<2, 15>(v, factor);
    return pack(0, [&](int j) { return v[j] > threshold ? 1u : 0u; });
  }

  // What values are multiplied by; 0 in blocks of zeros, a NaN in those without codes, as their
  // scale is.
  PYDIST_DEVICE_MEMBER float factor(float scale) const {
    return scale == 0.0f ? 0.0f : (scheme == Scheme::kLevels ? top : 1.0f) / scale;
  }
};

// ------------------------------------------------------------ decoding

PYDIST_DEVICE float half_value(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// What all runs of a launch share. Where a code has few bits, the lanes of a block hold the values
// of all codes, and a value is what the lane of that number has; all lanes then decode together.
struct Decoder {
  const BlockFormat& f;
  int width;  // lanes that hold all values, a power of two; 0: too few
  float own;  // the value that this lane holds, of scale 1

  PYDIST_DEVICE_MEMBER Decoder(const BlockFormat& format, int lanes)
      : f(format), width(f.scheme < Scheme::kE4M3 && (1 << f.bits) <= lanes ? 1 << f.bits : 0) {
    const int code = lane_id() & ((1 << f.bits) - 1);
    own =
        f.scheme == Scheme::kSign ? (code ? 1.0f : -1.0f) : level(static_cast<float>(code) - f.top);
  }

  // level_value() of q, or of top where there is more: no encoder writes that. The first product
  // is exact, so it may be fused.
  PYDIST_DEVICE_MEMBER float level(float q) const {
    q = fminf(q, f.top);
    return __fmaf_rn(q, f.inverse_high, q * f.inverse_low);
  }

  // Calls take(j, value) with what stands for each code before it is scaled.
  template <typename Take>
  PYDIST_DEVICE_MEMBER void each_code(Codes codes, const Take& take) const {
    const int shift = afresh(f.bits);
    const uint32_t mask = (1u << shift) - 1u;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      take(j, ((j < 4 ? codes.low : codes.high) >> (j % 4 * shift)) & mask);
    }
  }

  // v[j] += the value of code j. From -0, which any number is the sum with, these are the values.
  PYDIST_DEVICE_MEMBER void add(Codes codes, float scale, Run& v) const {
    if (width) {
      add_from_lanes(codes, scale, v);
    } else {
      add_computed(codes, scale, v);
    }
  }

  PYDIST_DEVICE_MEMBER void add_from_lanes(Codes codes, float scale, Run& v) const {
    const float table = own * scale;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t code = (j < 4 ? codes.low : codes.high) >> (j % 4 * f.bits);
      v[j] = v[j] + __shfl_sync(kAllLanes, table, static_cast<int>(code), width);
    }
  }

  PYDIST_DEVICE_MEMBER void add_computed(Codes codes, float scale, Run& v) const {
    if (f.scheme == Scheme::kLevels) {
      constexpr float kMagic = 8388608.0f;  // 2^23: in its low bits an integer is itself
      const float zero = kMagic + f.top;
      each_code(codes, [&](int j, uint32_t code) {
        v[j] = v[j] + level(bits_float(float_bits(kMagic) | code) - zero) * scale;
      });
    } else if (f.scheme == Scheme::kE4M3) {  // as float16, which has eight more in the exponent
      each_code(codes, [&](int j, uint32_t code) {
        const float x = half_value((code & 0x80u) << 8 | (code & 0x7Fu) << 7) * 256.0f;
        v[j] = v[j] + ((code & 0x7Fu) == 0x7Fu ? bits_float(kNanBits) : x) * scale;
      });
    } else {  // float16's upper byte
      each_code(codes, [&](int j, uint32_t code) { v[j] = v[j] + half_value(code << 8) * scale; });
    }
  }
};

}  // namespace pydist::cuda
