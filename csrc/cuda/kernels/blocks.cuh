// Blocks to warps: what the kernels of block formats share.
#pragma once

#include "../../wire/blocks.h"
#include "../sources.cuh"

namespace pydist::cuda {

constexpr int kWarpRun = kRun * kWarpSize;  // elements of a warp at a time: a step

// ------------------------------------------------------------ a block a warp

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
