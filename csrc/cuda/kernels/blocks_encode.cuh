// Scales and codes of blocks, from any source of values: of a whole tile, which stays in registers,
// or else of one block, which is passed over twice or three times (largest magnitude, sums, codes).
#pragma once

#include "blocks_tiles.cuh"

namespace pydist::cuda {

// ------------------------------------------------------------ largest magnitudes

// Of a lane's values; `spoilt` is a NaN where one was not finite.
struct Largest {
  float most = 0.0f, spoilt = 0.0f;

  PYDIST_DEVICE_MEMBER void add(const Run& v) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      most = fmaxf(most, fabsf(v[j]));  // of a number and NaN, the number
      spoilt = __fmaf_rn(v[j], 0.0f, spoilt);
    }
  }
  PYDIST_DEVICE_MEMBER uint32_t bits() const {
    return spoilt == 0.0f ? float_bits(most) : kInfBits;
  }
};

// The largest of `lanes` neighbouring lanes, on all of them.
PYDIST_DEVICE uint32_t largest_of_lanes(uint32_t largest, int lanes) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    if (distance >= lanes) continue;
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = other > largest ? other : largest;
  }
  return largest;
}

// ------------------------------------------------------------ l1 and l2 norms
// Sums of magnitudes or of squares, in the order that every backend has: lane l adds elements l,
// l + 32, ... of a block. They change lanes in `room`, a tile in shared memory.

PYDIST_DEVICE bool averaged(const BlockFormat& f) {
  return f.scheme < Scheme::kE4M3 && f.norm != Norm::kMax;
}

PYDIST_DEVICE void put_terms(float* room, const Run& v, Norm norm, uint32_t largest) {
  const float factor = power_of_two(-sum_exponent(largest));
  Run terms;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const float y = v[j] * factor;
    terms[j] = norm == Norm::kL1 ? fabsf(y) : y * y;
  }
  store_run<float, kRun, true>(room, kRun * lane_id(), kWarpRun, terms);
}

// sum, and then each 32nd of n elements.
PYDIST_DEVICE float add_rows(float sum, const float* room, int n) {
#pragma unroll 4
  for (int i = 0; i < n; i += kWarpSize) sum = sum + room[i + lane_id()];
  return sum;
}

PYDIST_DEVICE float add_lanes(float sum) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    sum = sum + __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

// ------------------------------------------------------------ scales

// The scale of a block of n elements, from its largest magnitude or the sum of its terms.
PYDIST_DEVICE float scale_of(const BlockFormat& f, uint32_t largest, float sum, int n) {
  if (largest >= kInfBits) return bits_float(kNanBits);
  if (f.scheme >= Scheme::kE4M3) return power_of_two(float8_scale_exponent(f.scheme, largest));
  if (f.norm == Norm::kMax) return stored_norm(f, bits_float(largest));
  if (f.scheme == Scheme::kSign) sum = sum / static_cast<float>(n);
  if (f.norm == Norm::kL2) sum = __fsqrt_rn(sum);
  return stored_norm(f, sum * power_of_two(sum_exponent(largest)));
}

// ------------------------------------------------------------ draws

// Those of the run that begins at an element of a row.
template <bool kStochastic>
PYDIST_DEVICE Philox4 draws_of(const EncodeArgs& a, const Row& row, int64_t element) {
  if (!kStochastic) return {};
  const DrawKey key = draw_key(a, row);
  const DrawKey here = {afresh(key.k0), afresh(key.k1), key.c2, key.ordinal};
  return draw_group(here, static_cast<uint64_t>(row.first + element) / kRun);
}

// ------------------------------------------------------------ a tile

// Where a launch writes, and how.
struct Output {
  const EncodeArgs& args;
  const Tiling& tiling;

  PYDIST_DEVICE_MEMBER int unit(const Group& group) const {
    const auto low = [](const unsigned char* p) { return static_cast<int>(address_of(p)); };
    const int codes = low(args.codes) | static_cast<int>(group.message);
    return unit_of(afresh(codes | (low(args.scales) & 3)));
  }
  static PYDIST_DEVICE_MEMBER float* room() {  // of this warp, a tile in shared memory
    __shared__ __align__(16) float tiles[kBlockWarps * kTileElements];
    return tiles + threadIdx.x / kWarpSize * kTileElements;
  }
  // The scale of one of the blocks of a group.
  PYDIST_DEVICE_MEMBER void put_scale(const Group& group, int k, float scale) const {
    unsigned char* out = args.scales + group.message + 4 * (group.index + k);
    if (unit(group) > 1) {
      *reinterpret_cast<uint32_t*>(out) = float_bits(scale);
    } else {
      store_word_bytes(out, float_bits(scale));
    }
  }
};

// A number for each step: that of the block which the lane has there.
template <typename T>
struct BySteps {
  T of[kSteps];
};

PYDIST_DEVICE BySteps<uint32_t> largest_of_blocks(const Tile& v, const Tiling& tiling) {
  BySteps<uint32_t> largest;
  if (tiling.joined()) {
    Largest all;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) all.add(v[s]);
    largest.of[0] = largest_of_lanes(all.bits(), kWarpSize);
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (tiling.joined()) {
      largest.of[s] = largest.of[0];
    } else {
      Largest own;
      own.add(v[s]);
      largest.of[s] = largest_of_lanes(own.bits(), tiling.lanes());
    }
  }
  return largest;
}

PYDIST_DEVICE BySteps<float> sums_of_blocks(const Tile& v, Norm norm, const Output& out,
                                            const BySteps<uint32_t>& largest) {
  BySteps<float> sums = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) put_terms(out.room() + s * kWarpRun, v[s], norm, largest.of[s]);
  __syncwarp();
#pragma unroll 1
  for (int k = 0; k < out.tiling.group(); ++k) {
    const float sum =
        add_lanes(add_rows(0.0f, out.room() + k * out.tiling.block, out.tiling.block));
#pragma unroll
    for (int s = 0; s < kSteps; ++s) sums.of[s] = out.tiling.place(s) == k ? sum : sums.of[s];
  }
  __syncwarp();  // the next tile's terms come after all were read
  return sums;
}

// The blocks of a whole tile. Source has run<true>(step, values), or load(tile) for all steps. All
// lanes call it together; returns whether all is finite.
template <bool kStochastic, typename Source, typename Kept>
PYDIST_DEVICE bool encode_tile(const Source& source, const Output& out, const Row& row,
                               const Group& group, const Kept& kept) {
  const BlockFormat& f = out.args.format;
  Tile v;
  source.tile(v);
  const BySteps<uint32_t> largest = largest_of_blocks(v, out.tiling);
  BySteps<float> sums = {};
  if (averaged(f)) sums = sums_of_blocks(v, f.norm, out, largest);
  const Encoder encoder(out.args);
  const int64_t at = group.message + group.index * block_bytes(f);
  unsigned char* codes = out.args.codes + at + encoder.bits * lane_id();
  float scale = 0.0f, factor = 0.0f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s == 0 || !out.tiling.joined()) {
      scale = scale_of(f, largest.of[s], sums.of[s], out.tiling.block);
      factor = encoder.factor(scale);
      if ((lane_id() & (out.tiling.lanes() - 1)) == 0) {
        out.put_scale(group, out.tiling.place(s), scale);
      }
    }
    const bool finite = largest.of[s] < kInfBits;
    const int64_t element = group.begin + s * kWarpRun + kRun * lane_id();
    Codes run =
        encoder.encode<kStochastic>(v[s], factor, draws_of<kStochastic>(out.args, row, element));
    if (!finite) run = {0, 0};
    store_codes(codes + s * kWarpSize * encoder.bits, encoder.bits, out.unit(group), kRun, run);
    kept.template step<true>(s * kWarpRun, v[s], run, scale, finite);
  }
  bool finite = true;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) finite = finite && largest.of[s] < kInfBits;
  return finite;
}

// ------------------------------------------------------------ any block

template <typename Source>
PYDIST_DEVICE uint32_t largest_of_block(const Source& source, int n) {
  Largest largest;
#pragma unroll 1
  for (int begin = 0; begin < n; begin += kWarpRun) {
    Run v;
    source.run(begin + kRun * lane_id(), v);
    largest.add(v);
  }
  return largest_of_lanes(largest.bits(), kWarpSize);
}

template <typename Source>
PYDIST_DEVICE float sum_of_block(const Source& source, int n, Norm norm, uint32_t largest,
                                 float* room) {
  float sum = 0.0f;
#pragma unroll 1
  for (int begin = 0; begin < n; begin += kWarpRun) {
    Run v;
    source.run(begin + kRun * lane_id(), v);
    put_terms(room, v, norm, largest);
    __syncwarp();
    sum = add_rows(sum, room, kWarpRun);  // behind the end there are zeros
    __syncwarp();
  }
  return add_lanes(sum);
}

// One block of n elements. Source has run(i, values), with zeros behind the end.
template <bool kStochastic, typename Source, typename Kept>
PYDIST_DEVICE bool encode_block(const Source& source, const Output& out, const Row& row,
                                const Group& block, const Kept& kept) {
  const EncodeArgs& a = out.args;
  const uint32_t largest = largest_of_block(source, block.n);
  const bool finite = largest < kInfBits;
  float sum = 0.0f;
  if (averaged(a.format)) sum = sum_of_block(source, block.n, a.format.norm, largest, out.room());
  const float scale = scale_of(a.format, largest, sum, block.n);
  if (lane_id() == 0) out.put_scale(block, 0, scale);
  const Encoder encoder(a);
  const float factor = encoder.factor(scale);
  const int64_t at = block.index * block_bytes(a.format), left = a.code_bytes - at;
  const int room = static_cast<int>(left < block_bytes(a.format) ? left : block_bytes(a.format));
#pragma unroll 1
  for (int begin = 0; begin / kRun * encoder.bits < room; begin += kWarpRun) {
    const int i = begin + kRun * lane_id(), byte = i / kRun * encoder.bits;
    Run v;
    source.run(i, v);
    Codes run =
        encoder.encode<kStochastic>(v, factor, draws_of<kStochastic>(a, row, block.begin + i));
    const int count = block.n - i < kRun ? block.n - i : kRun;
    run = first_codes(run, encoder.bits, finite && count > 0 ? count : 0);
    unsigned char* codes = a.codes + block.message + at + byte;
    store_codes(codes, encoder.bits, out.unit(block), room - byte, run);
    kept.template step<false>(begin, v, run, scale, finite);
  }
  return finite;
}

// ------------------------------------------------------------ rows

// What is encoded, and what is done with the codes.
template <typename Source, typename Kept>
struct Encoding {
  Source source;
  Kept kept;
};

struct Nothing {
  template <bool kWhole>
  PYDIST_DEVICE_MEMBER void step(int, const Run&, Codes, float, bool) const {}
};

// Encodes the blocks of this warp; make(row, blocks) gives the Encoding of such,
// of whole tiles too if `tiles`.
template <bool kStochastic, typename Make>
PYDIST_DEVICE void encode_rows(const Rows& rows, const EncodeArgs& a, const Tiling& tiling,
                               bool tiles, uint32_t* flags, const Make& make) {
  const Output out = {a, tiling};
  bool finite = true;
  for_groups(rows, tiling, [&](const Row& row, const Group& group) {
    const int64_t addresses = row.x | row.momentum | row.momentum_out;
    if (tiles && out.unit(group) > 1 && group.whole(tiling) && aligned<16>(addresses)) {
      const auto [source, kept] = make(row, group);
      finite &= encode_tile<kStochastic>(source, out, row, group, kept);
      return;
    }
#pragma unroll 1
    for (int k = 0; k < group.blocks(tiling); ++k) {
      const Group block = group.at(k, tiling);
      const auto [source, kept] = make(row, block);
      finite &= encode_block<kStochastic>(source, out, row, block, kept);
    }
  });
  raise_flags(flags, !finite);
}

}  // namespace pydist::cuda
