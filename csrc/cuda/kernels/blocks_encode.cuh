// Scales and codes of blocks, from any source of values: of a whole tile, which stays in registers,
// or else of one block, which is passed over twice or three times (largest magnitude, sums, codes).
#pragma once

#include "blocks_tiles.cuh"

namespace pydist::cuda {

// ------------------------------------------------------------ largest magnitudes

// The larger of two numbers; a NaN where one of them is.
PYDIST_DEVICE float larger_or_nan(float a, float b) {
#if defined(EMULATION)
  return a > b || a != a ? a : b;
#else
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#endif
}

// The bits of the largest of a lane's; from kInfBits on where one of the values is not finite.
PYDIST_DEVICE uint32_t largest_of_run(const Run& v) {
  float most = 0.0f;
#pragma unroll
  for (int j = 0; j < kRun; ++j) most = larger_or_nan(most, fabsf(v[j]));
  return float_bits(most);
}

PYDIST_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The largest of all lanes, on all of them.
PYDIST_DEVICE uint32_t largest_of_lanes(uint32_t largest) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, distance));
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
  // The scale of one of the blocks of a group. kWords: payloads may be written in words.
  template <bool kWords>
  PYDIST_DEVICE_MEMBER void put_scale(const Group& group, int k, float scale) const {
    unsigned char* out = args.scales + group.message + 4 * (group.index + k);
    if (kWords || unit(group) > 1) {
      *reinterpret_cast<uint32_t*>(out) = float_bits(scale);
    } else {
      store_word_bytes(out, float_bits(scale));
    }
  }
};

// The bits of the largest magnitude of the block that this lane looks after.
PYDIST_DEVICE uint32_t largest_of_tile(const Tile& v, const Tiling& tiling) {
  const uint32_t first = largest_of_run(v[0]), second = largest_of_run(v[1]);
  uint32_t own = larger(first, second), other = own;
  if (!tiling.joined()) {
    own = tiling.own_step() == 0 ? first : second;
    other = tiling.own_step() == 0 ? second : first;
  }
  own = larger(own, __shfl_xor_sync(kAllLanes, other, 1));
#pragma unroll
  for (int distance = 2; distance < kWarpSize; distance *= 2) {
    if (distance >= tiling.lanes()) break;
    own = larger(own, __shfl_xor_sync(kAllLanes, own, distance));
  }
  return own;
}

// The sum of the terms of the block that this lane looks after.
PYDIST_DEVICE float sum_of_tile(const Tile& v, Norm norm, const Output& out, uint32_t largest) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    put_terms(out.room() + s * kWarpRun, v[s], norm, out.tiling.of_step(largest, s));
  }
  __syncwarp();
  float own = 0.0f;
#pragma unroll 1
  for (int k = 0; k < out.tiling.group(); ++k) {
    const float sum =
        add_lanes(add_rows(0.0f, out.room() + k * out.tiling.block, out.tiling.block));
    own = out.tiling.place(out.tiling.own_step()) == k ? sum : own;
  }
  __syncwarp();  // the next tile's terms come after all were read
  return own;
}

// The blocks of a whole tile. Source has tile(values). All lanes call it together; returns whether
// what this lane looks after is finite.
template <bool kStochastic, typename Source, typename Kept>
PYDIST_DEVICE bool encode_tile(const Source& source, const Output& out, const Row& row,
                               const Group& group, const Kept& kept) {
  const BlockFormat& f = out.args.format;
  const Tiling& tiling = out.tiling;
  Tile v;
  source.tile(v);
  const uint32_t largest = largest_of_tile(v, tiling);
  const float sum = averaged(f) ? sum_of_tile(v, f.norm, out, largest) : 0.0f;
  const float own_scale = scale_of(f, largest, sum, tiling.block);
  if (tiling.first_of_block()) {
    out.put_scale<true>(group, tiling.place(tiling.own_step()), own_scale);
  }
  const Encoder encoder(out.args);
  const float own_factor = encoder.factor(own_scale);
  const int64_t at = group.message + group.index * block_bytes(f);
  unsigned char* codes = out.args.codes + at + encoder.bits * lane_id();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const float factor = tiling.of_step(own_factor, s);
    const bool finite = factor >= 0.0f;  // and not a NaN
    const int64_t element = group.begin + s * kWarpRun + kRun * lane_id();
    Codes run =
        encoder.encode<kStochastic>(v[s], factor, draws_of<kStochastic>(out.args, row, element));
    if (!finite) run = {0, 0};
    store_codes<true>(codes + s * kWarpSize * encoder.bits, encoder.bits, out.unit(group), kRun,
                      run);
    const auto scale = [&] { return tiling.of_step(own_scale, s); };
    kept.template step<true>(s * kWarpRun, v[s], run, scale, finite);
  }
  return largest < kInfBits;
}

// ------------------------------------------------------------ any block

template <typename Source>
PYDIST_DEVICE uint32_t largest_of_block(const Source& source, int n) {
  uint32_t largest = 0;
#pragma unroll 1
  for (int begin = 0; begin < n; begin += kWarpRun) {
    Run v;
    source.run(begin + kRun * lane_id(), v);
    largest = larger(largest, largest_of_run(v));
  }
  return largest_of_lanes(largest);
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
  if (lane_id() == 0) out.put_scale<false>(block, 0, scale);
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
    store_codes<false>(codes, encoder.bits, out.unit(block), room - byte, run);
    kept.template step<false>(begin, v, run, [&] { return scale; }, finite);
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
  template <bool kWhole, typename Scale>
  PYDIST_DEVICE_MEMBER void step(int, const Run&, Codes, const Scale&, bool) const {}
};

// Encodes the blocks of this warp; make(row, blocks) gives the Encoding of such,
// of whole tiles too if `tiles`.
template <bool kStochastic, bool kApart, typename Make>
PYDIST_DEVICE void encode_rows(const Rows& rows, const EncodeArgs& a, const Tiling& tiling,
                               bool tiles, uint32_t* flags, const Make& make) {
  const Output out = {a, tiling};
  bool finite = true;
  for_groups<kApart>(rows, tiling, [&](const Row& row, const Group& group) PYDIST_INLINED {
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
