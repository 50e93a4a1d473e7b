// What all ranks sent for a tile: decoded, added in rank order, divided once.
#pragma once

#include "blocks_tiles.cuh"

namespace pydist::cuda {

// The codes of one rank for some steps, and the scales that this lane has there.
template <int kCount>
struct Sent {
  Packed codes[kCount];
  float scale[kCount];
};

// The messages of all ranks, as of one launch.
struct Ranks {
  const DecodeArgs* args;
  Decoder decoder;
  int unit;

  PYDIST_DEVICE_MEMBER Ranks(const DecodeArgs& a, const Tiling& tiling)
      : args(&a),
        decoder(a.format, tiling.lanes()),
        unit(unit_of(address_of(a.codes) | a.stride | (address_of(a.scales) & 3))) {}
};

// Blocks as a source of values.
struct Reduced {
  const Ranks& ranks;
  const Tiling& tiling;
  const unsigned char* codes;   // rank 0's for this lane
  const unsigned char* scales;  // rank 0's
  int before;                   // bytes of others in the word that this lane's begin in
  int n;                        // elements

  PYDIST_DEVICE_MEMBER Reduced(const Ranks& all, const Group& group, const Tiling& t)
      : ranks(all),
        tiling(t),
        codes(all.args->codes + group.index * block_bytes(all.args->format) +
              all.decoder.bits * lane_id()),
        scales(all.args->scales + 4 * group.index),
        before(all.unit > 1 ? static_cast<int>(address_of(codes) & 3) : 0),
        n(group.n) {
    codes -= before;
  }

  // What a rank sent for kCount steps; of a whole tile in words, all of it.
  template <int kCount, bool kWhole>
  PYDIST_DEVICE_MEMBER Sent<kCount> sent(int64_t message, int step) const {
    const int bits = afresh(ranks.decoder.bits);
    Sent<kCount> sent;
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const int at = (step + s) * kWarpSize * bits;
      const int room =
          kWhole ? bits
                 : static_cast<int>(code_bytes(ranks.args->format, n)) - at - bits * lane_id();
      const int bytes = room < bits ? room : bits;
      sent.codes[s] = kWhole || ranks.unit > 1 ? load_words(codes + message + at, before, bytes)
                                               : load_bytes(codes + message + at, bytes);
      const unsigned char* scale = scales + message + (kWhole ? 4 * tiling.place(s) : 0);
      sent.scale[s] =
          bits_float(kWhole || ranks.unit > 1 ? *reinterpret_cast<const uint32_t*>(scale)
                                              : load_word_bytes(scale));
    }
    return sent;
  }

  // All lanes call it together. Returns whether no value can be a NaN.
  template <int kCount, bool kWhole>
  PYDIST_DEVICE_MEMBER bool add(int step, Run (&v)[kCount]) const {
    const int count = static_cast<int>(ranks.args->ranks);
    uint32_t largest = 0;  // of the scales
    Sent<kCount> next = sent<kCount, kWhole>(0, step);
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) v[s][j] = -0.0f;
    }
#pragma unroll 1
    for (int r = 1; r <= count; ++r) {
      const Sent<kCount> now = next;
      if (r < count)
        next = sent<kCount, kWhole>(r * ranks.args->stride, step);  // on its way meanwhile
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        const uint32_t magnitude = float_bits(now.scale[s]) & kAbsMask;
        largest = magnitude > largest ? magnitude : largest;
        ranks.decoder.add(now.codes[s].codes(ranks.decoder.bits, 8 * before), now.scale[s], v[s]);
      }
    }
    if (ranks.args->divisor != 1.0f) {
      const Divisor divisor(bits_float(afresh(float_bits(ranks.args->divisor))));
#pragma unroll
      for (int s = 0; s < kCount; ++s) divide(v[s], divisor);
    }
    return ranks.decoder.scheme < Scheme::kE4M3 && largest < kInfBits;
  }

  PYDIST_DEVICE_MEMBER bool tile(Tile& v) const { return add<kSteps, true>(0, v); }

  PYDIST_DEVICE_MEMBER void run(int i, Run& v) const {
    Run one[1];
    add<1, false>(i / kWarpRun, one);
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = i + j < n ? one[0][j] : 0.0f;
  }
};

}  // namespace pydist::cuda
