// One block of elements to codes and scale, and back; what the kernels of block formats share.
//
// A warp takes a block. A lane takes runs of eight consecutive elements, which are one Philox group
// and `bits` bytes of codes; only sums go element by element, in the order that every backend has.
// A block is passed over twice or three times (largest magnitude, sum, codes): it comes out of
// memory once, and then out of the cache.
#pragma once

#include "../../wire/blocks.h"
#include "../sources.cuh"

namespace pydist::cuda {

constexpr int kWarpRun = kRun * kWarpSize;  // elements of a warp at a time

// ------------------------------------------------------------ codes and bytes

// A run of codes, the first in the lowest bits; `room` bytes may be touched.
PYDIST_DEVICE uint64_t load_codes(const unsigned char* p, int bits, int64_t room) {
  if (bits == 8 && room >= 8) {
    return load_word(p) | static_cast<uint64_t>(load_word(p + 4)) << 32;
  }
  if (bits == 4 && room >= 4) return load_word(p);
  uint64_t codes = 0;
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    if (b < bits && b < room) codes |= static_cast<uint64_t>(p[b]) << (8 * b);
  }
  return codes;
}

PYDIST_DEVICE void store_codes(unsigned char* p, int bits, int64_t room, uint64_t codes) {
  if (bits == 8 && room >= 8) {
    store_word(p, static_cast<uint32_t>(codes));
    store_word(p + 4, static_cast<uint32_t>(codes >> 32));
  } else if (bits == 4 && room >= 4) {
    store_word(p, static_cast<uint32_t>(codes));
  } else {
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      if (b < bits && b < room) p[b] = static_cast<unsigned char>(codes >> (8 * b));
    }
  }
}

// ------------------------------------------------------------ values

PYDIST_DEVICE float value_of(const BlockFormat& f, uint32_t code, float scale) {
  if (f.scheme == Scheme::kSign) return code ? scale : -scale;
  if (f.scheme == Scheme::kLevels) {
    const float q = static_cast<float>(static_cast<int>(code)) - f.top;
    return level_value(f, q < f.top ? q : f.top) * scale;  // no encoder writes top + 1
  }
  return float8_value(f.scheme, code) * scale;
}

// What all ranks sent for the elements of a block: decoded, added in rank order, divided.
struct Reduced {
  const DecodeArgs* a;
  const unsigned char* codes;  // rank 0's, of this block
  const unsigned char* scale;
  int n;

  PYDIST_DEVICE_MEMBER Reduced(const DecodeArgs& args, int64_t index, int elements)
      : a(&args),
        codes(args.codes + index * block_bytes(args.format)),
        scale(args.scales + 4 * index),
        n(elements) {}

  // The run from element i on, a multiple of kRun; what is missing is not defined.
  PYDIST_DEVICE_MEMBER void run(int i, Run& v) const {
    const BlockFormat& f = a->format;
    const int at = i / kRun * f.bits;
    const int64_t room = code_bytes(f, n) - at;
    const uint32_t mask = (1u << f.bits) - 1u;
#pragma unroll 1
    for (int64_t r = 0; r < a->ranks; ++r) {
      const float s = bits_float(load_word(scale + r * a->stride));
      const uint64_t packed = load_codes(codes + r * a->stride + at, f.bits, room);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const float x = value_of(f, static_cast<uint32_t>(packed >> (j * f.bits)) & mask, s);
        v[j] = r ? v[j] + x : x;
      }
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = v[j] / a->divisor;
  }

  PYDIST_DEVICE_MEMBER float one(int i) const {
    const BlockFormat& f = a->format;
    const int bit = i * f.bits;
    const unsigned char* p = codes + bit / 8;
    const bool crosses = bit % 8 + f.bits > 8;
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t r = 0; r < a->ranks; ++r) {
      const unsigned char* q = p + r * a->stride;
      const uint32_t two = crosses ? q[0] | static_cast<uint32_t>(q[1]) << 8 : q[0];
      const float x = value_of(f, (two >> (bit % 8)) & ((1u << f.bits) - 1u),
                               bits_float(load_word(scale + r * a->stride)));
      sum = r ? sum + x : x;
    }
    return sum / a->divisor;
  }
};

// ------------------------------------------------------------ scales

// The bits of the largest magnitude, or of something not finite, on all lanes.
template <typename Source>
PYDIST_DEVICE uint32_t largest_magnitude(const Source& x, int n, int lane) {
  uint32_t largest = 0;
  for (int i = kRun * lane; i < n; i += kWarpRun) {
    Run v;
    x.run(i, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t magnitude = float_bits(v[j]) & kAbsMask;
      if (i + j < n && magnitude > largest) largest = magnitude;
    }
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = other > largest ? other : largest;
  }
  return largest;
}

template <typename Source>
PYDIST_DEVICE float mean_scale(const Source& x, int n, const BlockFormat& f, uint32_t largest,
                               int lane) {
  const int exponent = sum_exponent(largest);
  const float factor = power_of_two(-exponent);
  float sum = 0.0f;
  for (int i = lane; i < n; i += kWarpSize) {
    const float y = x.one(i) * factor;
    sum = sum + (f.norm == Norm::kL1 ? bits_float(float_bits(y) & kAbsMask) : y * y);
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    sum = sum + bits_float(__shfl_xor_sync(kAllLanes, float_bits(sum), distance));
  }
  if (f.scheme == Scheme::kSign) sum = sum / static_cast<float>(n);
  if (f.norm == Norm::kL2) sum = __fsqrt_rn(sum);
  return stored_norm(f, sum * power_of_two(exponent));
}

// ------------------------------------------------------------ codes

// What a lane needs to turn values into codes.
struct Encoder {
  BlockFormat f;
  float scale, factor;
  bool zero_bit;

  PYDIST_DEVICE_MEMBER Encoder(const EncodeArgs& a, float s)
      : f(a.format),
        scale(s),
        factor(f.scheme == Scheme::kLevels ? level_factor(f, s) : 1.0f / s),
        zero_bit(a.zero_bit != 0) {}

  PYDIST_DEVICE_MEMBER uint32_t nearest(float x) const {
    if (f.scheme == Scheme::kSign) return (zero_bit ? x >= 0.0f : x > 0.0f) ? 1u : 0u;
    const float most = f.scheme == Scheme::kLevels ? f.top : float8_largest(f.scheme);
    float t = x * factor;
    t = t > most ? most : t < -most ? -most : t;
    if (f.scheme == Scheme::kLevels) return float_bits((t + kRoundingMagic) + f.top) & 0xFFu;
    return float8_code(f.scheme, t);
  }

  PYDIST_DEVICE_MEMBER uint32_t stochastic(float x, uint32_t draw) const {
    float a = bits_float(float_bits(x) & kAbsMask) * factor;
    a = a > f.top ? f.top : a;
    const float near = (a + kRoundingMagic) - kRoundingMagic;
    const float floor = near > a ? near - 1.0f : near;
    const float fraction = a - floor;
    const bool up = fraction * 65536.0f > static_cast<float>(static_cast<int>(draw));
    const float level = up ? floor + 1.0f : floor;
    const float q = x < 0.0f ? -level : level;
    return static_cast<uint32_t>(static_cast<int>(q + f.top));
  }
};

// The scale and the codes of one block. Source has run(i, v) and one(i); kept(i, v, codes, encoder)
// is called for each run of a block that is finite. All lanes call it together. Returns whether the
// block is finite.
template <bool kStochastic, typename Source, typename Kept>
PYDIST_DEVICE bool encode_block(const Source& x, int64_t index, int n, const EncodeArgs& a,
                                const DrawKey& key, int64_t first, int lane, const Kept& kept) {
  const BlockFormat& f = a.format;
  const uint32_t largest = largest_magnitude(x, n, lane);
  const bool finite = largest < kInfBits;
  float scale = bits_float(kNanBits);
  if (finite) {
    if (f.scheme >= Scheme::kE4M3) {
      scale = power_of_two(float8_scale_exponent(f.scheme, largest));
    } else if (f.norm == Norm::kMax) {
      scale = stored_norm(f, bits_float(largest));
    } else {
      scale = mean_scale(x, n, f, largest, lane);
    }
  }
  if (lane == 0) store_word(a.scales + 4 * index, float_bits(scale));
  __syncwarp();  // nothing that was read above is written before all lanes have read it
  const Encoder encoder(a, scale);
  const int64_t begin = index * block_bytes(f);
  const int64_t left = a.code_bytes - begin;
  const int room = static_cast<int>(left < block_bytes(f) ? left : block_bytes(f));
  unsigned char* out = a.codes + begin;
#pragma unroll 1
  for (int i = kRun * lane, at = f.bits * lane; at < room;
       i += kWarpRun, at += f.bits * kWarpSize) {
    uint64_t codes = 0;
    if (finite && i < n) {
      Run v;
      x.run(i, v);
      Philox4 draws = {};
      if (kStochastic) draws = draw_group(key, static_cast<uint64_t>(first + i) / kRun);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const uint32_t code =
            kStochastic ? encoder.stochastic(v[j], draw16(draws, j)) : encoder.nearest(v[j]);
        if (i + j < n) codes |= static_cast<uint64_t>(code) << (j * f.bits);
      }
      kept(i, v, codes, encoder);
    }
    store_codes(out + at, f.bits, room - at, codes);
  }
  return finite;
}

// ------------------------------------------------------------ blocks to warps

// Calls body(row, index, begin, n) for the blocks of this warp: number in the payload, first
// element in the row, elements. `words` of rows count blocks here.
template <typename Body>
PYDIST_DEVICE void for_blocks(const Rows& rows, int block, const Body& body) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kBlockWarps;
  int64_t work = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarpSize;
  for (; work < rows.words; work += warps) {
    const Row row = row_at(rows, find_row(rows, work));
    const int64_t k = work - row.words_before;
    const int64_t begin = k * block;
    const int64_t rest = row.n - begin;
    body(row, row.word + k, begin, static_cast<int>(rest < block ? rest : block));
  }
}

PYDIST_DEVICE DrawKey draw_key(const EncodeArgs& a, const Row& row) {
  return {a.seed, a.key1, static_cast<uint32_t>(step_of(a)), static_cast<uint32_t>(row.ordinal)};
}

// Launches kernel(rows, args...), a warp a block, if there are any.
template <typename... Params, typename... Args>
void launch_blocks(const char* name, void (*kernel)(Rows, Params...), const Rows& rows,
                   void* stream, Args&&... args) {
  launch_over<1>(name, kernel, rows, stream, std::forward<Args>(args)...);
}

}  // namespace pydist::cuda
