// A warp takes a tile of 512 elements in two steps; in each a lane holds a run of eight. A tile is
// one block or several of a row. What does not fit whole tiles goes block by block.
#pragma once

#include <cuda_bf16.h>

#include "../division.cuh"
#include "blocks_codes.cuh"

namespace pydist::cuda {

constexpr int kSteps = 2;
constexpr int kTileElements = kSteps * kWarpRun;
constexpr int kLogRuns = 6;  // of the runs of a tile

using Tile = Run[kSteps];

// How blocks lie in tiles.
struct Tiling {
  int block;      // elements
  int log_lanes;  // of the runs of a block: the lanes that it has, in all steps

  explicit __host__ PYDIST_DEVICE_MEMBER Tiling(int elements) : block(elements), log_lanes(2) {
    const bool power = (block & (block - 1)) == 0;
    for (int shorter = 32; shorter < kTileElements; shorter *= 2) {
      log_lanes += !power || block > shorter;
    }
  }

  // Blocks that a warp takes at a time: those of a tile, or one.
  __host__ PYDIST_DEVICE_MEMBER int group() const { return 1 << (kLogRuns - log_lanes); }
  PYDIST_DEVICE_MEMBER bool joined() const { return log_lanes == kLogRuns; }  // all are one block's
  PYDIST_DEVICE_MEMBER int lanes() const { return joined() ? kWarpSize : 1 << log_lanes; }
  // Which of the blocks of a tile this lane has in a step.
  PYDIST_DEVICE_MEMBER int place(int step) const {
    return (kWarpSize * step + lane_id()) >> afresh(log_lanes);
  }

  // A lane looks after one block, though it has runs of two: where a tile is of several, an even
  // lane after the one of step 0, an odd lane after that of step 1.
  PYDIST_DEVICE_MEMBER int own_step() const { return joined() ? 0 : lane_id() % kSteps; }
  // Whether no lane before this one looks after the same block.
  PYDIST_DEVICE_MEMBER bool first_of_block() const {
    return (lane_id() & (joined() ? kWarpSize - 1 : lanes() - kSteps)) == 0;
  }
  // What was found of the block that this lane has in a step. All lanes call it together.
  PYDIST_DEVICE_MEMBER float of_step(float own, int step) const {
    return __shfl_sync(kAllLanes, own, (lane_id() & -kSteps) + step);
  }
  PYDIST_DEVICE_MEMBER uint32_t of_step(uint32_t own, int step) const {
    return __shfl_sync(kAllLanes, own, (lane_id() & -kSteps) + step);
  }
};

// Blocks of a row that a warp takes at a time: their places and elements.
struct Group {
  int64_t message;  // bytes before the message that the row is in; a multiple of 4
  int64_t index;    // of the first block, in the message
  int64_t begin;    // its first element, in the row
  int n;            // elements

  PYDIST_DEVICE_MEMBER int blocks(const Tiling& tiling) const {
    return (n + tiling.block - 1) / tiling.block;
  }

  PYDIST_DEVICE_MEMBER bool whole(const Tiling& tiling) const {
    return n == kTileElements && tiling.group() * tiling.block == kTileElements;
  }

  // One of its blocks.
  PYDIST_DEVICE_MEMBER Group at(int k, const Tiling& tiling) const {
    const int rest = n - k * tiling.block;
    const int64_t from = begin + k * tiling.block;
    return {message, index + k, from, rest < tiling.block ? rest : tiling.block};
  }
};

// Of a lambda that is called in two places.
#define PYDIST_INLINED __attribute__((always_inline))

// Calls body(row, group) for the groups of this warp. `words` of rows count blocks. kApart: twice
// the code, half of it for the launch's own row, whose fields are constants and need no registers.
template <bool kApart, typename Body>
PYDIST_DEVICE void for_groups(const Rows& rows, const Tiling& tiling, const Body& body) {
  const auto group = [&] { return afresh(tiling.group()); };
  const auto take = [&](const Row& row, int64_t start) PYDIST_INLINED {
    const int64_t begin = start * tiling.block;
    const int most = tiling.group() * tiling.block;
    const int64_t rest = row.n - begin;
    const int n = static_cast<int>(rest < most ? rest : most);
    body(row, Group{row.message, row.word + start, begin, n});
  };
  if constexpr (kApart) {
    if (!rows.table) {
      const int64_t warp = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarpSize;
      const int64_t warps = static_cast<int64_t>(gridDim.x) * kBlockWarps;
      int64_t start = warp * group();
      for (; start < rows.words; start += warps * group()) take(rows.only, start);
      return;
    }
  }
  for_chunks(rows, group, tiling.block, take);
}

// Launches kernel(rows, args...), a warp a group, if there are any.
template <typename... Params, typename... Args>
void launch_groups(const char* name, int block, void (*kernel)(Rows, Params...), const Rows& rows,
                   void* stream, Args&&... args) {
  launch_tiles(name, kernel, rows, Tiling(block).group(), stream, std::forward<Args>(args)...);
}

// ------------------------------------------------------------ values to memory

// Eight values that are not NaN, as words.
PYDIST_DEVICE void words_of(const Run& v, const float*, uint32_t (&raw)[kRun]) {
#pragma unroll
  for (int j = 0; j < kRun; ++j) raw[j] = float_bits(v[j]);
}
PYDIST_DEVICE void words_of(const Run& v, const Half*, uint32_t (&raw)[kRun / 2]) {
#pragma unroll
  for (int j = 0; j < kRun; j += 2) {
    const __half2 pair = __floats2half2_rn(v[j], v[j + 1]);
    raw[j / 2] = __half_as_ushort(__low2half(pair)) |
                 static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16;
  }
}
PYDIST_DEVICE void words_of(const Run& v, const BFloat*, uint32_t (&raw)[kRun / 2]) {
#pragma unroll
  for (int j = 0; j < kRun; j += 2) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[j], v[j + 1]);
    raw[j / 2] = __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y))
                                                    << 16;
  }
}

PYDIST_DEVICE uint4 quad(const uint32_t* w) { return make_uint4(w[0], w[1], w[2], w[3]); }

// The runs of all lanes, none of which has a NaN; x points to the step's, aligned. A run of float32
// is two stores: lanes exchange halves in pairs, so that each store fills sectors of 32 bytes.
template <typename T>
PYDIST_DEVICE void store_step(T* x, const Run& v) {
  constexpr int kWords = kRun * static_cast<int>(sizeof(T)) / 4;
  uint32_t raw[kWords];
  words_of(v, x, raw);
  uint4* out = reinterpret_cast<uint4*>(x);
  const int lane = lane_id();
  if constexpr (kWords == 4) {
    out[lane] = quad(raw);
  } else {
    const bool odd = lane % 2 != 0;
    uint32_t first[4], second[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? raw[j] : raw[4 + j], 1);
      first[j] = odd ? other : raw[j];
      second[j] = odd ? raw[4 + j] : other;
    }
    uint4* pair = out + 2 * lane - lane % 2;  // of the even lane's run, its half of this lane
    pair[0] = quad(first);
    pair[2] = quad(second);
  }
}

// A run, from element i of n on, with any values.
template <typename T>
PYDIST_DEVICE void store_values(T* x, int i, int n, bool vector, const Run& v) {
  T values[kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j) narrow(v[j], &values[j]);
  if (vector && i + kRun <= n) {
    store_run<T, kRun, true>(x, i, n, values);
  } else {
    store_run<T, kRun, false>(x, i, n, values);
  }
}

}  // namespace pydist::cuda
