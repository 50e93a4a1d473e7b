// What all ranks sent for a tile: decoded, added in rank order, divided once.
#pragma once

#include "blocks_tiles.cuh"

namespace pydist::cuda {

// The codes of one rank for some steps, and the scales that this lane has there.
template <int kCount, int kWords>
struct Sent {
  Packed<kWords> codes[kCount];
  float scale[kCount];
};

// The messages of all ranks, as of one launch.
struct Ranks {
  const DecodeArgs* args;
  Decoder decoder;

  PYDIST_DEVICE_MEMBER Ranks(const DecodeArgs& a, const Tiling& tiling)
      : args(&a), decoder(a.format, tiling.lanes()) {}

  // Whether codes and scales may be read in words.
  PYDIST_DEVICE_MEMBER bool in_words() const {
    const int64_t all = address_of(args->codes) | address_of(args->scales) | args->stride;
    return aligned<4>(afresh(static_cast<int>(all)));
  }
};

// Blocks as a source of values. So many words of each step are loaded before any is waited
// for: of four ranks, where a run is one word.
template <int kWordsAhead>
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
        codes(all.args->codes + group.message + group.index * block_bytes(all.args->format) +
              all.decoder.f.bits * lane_id()),
        scales(all.args->scales + group.message + 4 * group.index),
        before(all.in_words() ? static_cast<int>(address_of(codes) & 3) : 0),
        n(group.n) {
    codes -= before;
  }

  // Where a rank's codes and scales for a step are.
  struct Place {
    const unsigned char *codes, *scales;
    int step_bytes, bytes[2], scale[2];  // from step to step; of codes that there are; of the scale
  };

  // What a rank sent for kCount steps; of a whole tile in words, all of it. kNibbles: of one block
  // of four bits, whose codes are words of their own and whose scale is one.
  template <int kCount, bool kWhole, int kWords, bool kNibbles>
  PYDIST_DEVICE_MEMBER Sent<kCount, kWords> sent(const Place& at) const {
    Sent<kCount, kWords> sent;
    const bool in_words = kWhole || ranks.in_words();
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const unsigned char* run = at.codes + s * (kNibbles ? 4 * kWarpSize : at.step_bytes);
      const unsigned char* scale = at.scales + (kWhole && !kNibbles ? at.scale[s] : 0);
      sent.codes[s] = in_words ? load_words<kWords, kWhole>(run, before, at.bytes[s])
                               : load_bytes<kWords>(run, at.bytes[s]);
      if (kNibbles && s > 0) {
        sent.scale[s] = sent.scale[0];
        continue;
      }
      sent.scale[s] =
          bits_float(in_words ? *reinterpret_cast<const uint32_t*>(scale) : load_word_bytes(scale));
    }
    return sent;
  }

  template <int kCount, bool kWhole>
  PYDIST_DEVICE_MEMBER Place place(int step) const {
    const int bits = afresh(ranks.decoder.f.bits), step_bytes = kWarpSize * bits;
    Place at = {codes + step * step_bytes, scales, step_bytes, {}, {}};
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      at.scale[s] = 4 * tiling.place(s);
      at.bytes[s] = bits;
      if (kWhole) continue;
      const int rest = static_cast<int>(code_bytes(ranks.args->format, n)) -
                       (step + s) * step_bytes - bits * lane_id();
      if (rest < bits) at.bytes[s] = rest;
    }
    return at;
  }

  // v[s][j] += all ranks' values; returns the bits of the largest scale.
  template <int kWords, int kCount, bool kWhole, bool kNibbles = false>
  PYDIST_DEVICE_MEMBER uint32_t add_ranks(Place at, Run (&v)[kCount]) const {
    const int count = static_cast<int>(ranks.args->ranks);
    uint32_t largest = 0;
    constexpr int kAhead = kWordsAhead > kWords ? kWordsAhead / kWords : 1;  // ranks
#pragma unroll 1
    for (int r = 0; r < count; r += kAhead) {
      Sent<kCount, kWords> ahead[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (r + k < count) ahead[k] = sent<kCount, kWhole, kWords, kNibbles>(at);
        at.codes += ranks.args->stride;
        at.scales += ranks.args->stride;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (r + k >= count) break;
#pragma unroll
        for (int s = 0; s < kCount; ++s) {
          const float scale = ahead[k].scale[s];
          const uint32_t magnitude = float_bits(scale) & kAbsMask;
          largest = magnitude > largest ? magnitude : largest;
          const Codes run =
              ahead[k].codes[s].codes(ranks.decoder.f.bits, kNibbles ? 0 : 8 * before);
          if constexpr (kWords == 1) {
            ranks.decoder.add_from_lanes(run, scale, v[s]);
          } else if constexpr (kWords == 2) {
            ranks.decoder.add_computed(run, scale, v[s]);
          } else {
            ranks.decoder.add(run, scale, v[s]);
          }
        }
      }
    }
    return largest;
  }

  // All lanes call it together. Returns whether no value can be a NaN.
  template <int kCount, bool kWhole>
  PYDIST_DEVICE_MEMBER bool add(int step, Run (&v)[kCount]) const {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) v[s][j] = -0.0f;
    }
    const Place at = place<kCount, kWhole>(step);
    const bool in_lanes = ranks.decoder.width != 0 && one_word(ranks.decoder.f.bits);
    uint32_t largest;
    if (kWhole && kWordsAhead > 2 && in_lanes && ranks.decoder.f.bits == 4 && tiling.joined()) {
      largest = add_ranks<1, kCount, kWhole, true>(at, v);
    } else if (kWhole && in_lanes) {
      largest = add_ranks<1, kCount, kWhole>(at, v);
    } else if (kWhole && kWordsAhead > 2 && ranks.decoder.f.bits == 8) {
      largest = add_ranks<2, kCount, kWhole>(at, v);
    } else {
      largest = add_ranks<3, kCount, kWhole>(at, v);
    }
    if (ranks.args->divisor != 1.0f) {
      const Divisor divisor(bits_float(afresh(float_bits(ranks.args->divisor))));
#pragma unroll
      for (int s = 0; s < kCount; ++s) divide(v[s], divisor);
    }
    return ranks.decoder.f.scheme < Scheme::kE4M3 && largest < kInfBits;
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
