// What the kernels of top-k blocks share. A thread block takes a block of elements.
#pragma once

#include "../../wire/blocks.h"
#include "../../wire/topk.h"
#include "../sources.cuh"

// The most elements of a block that are looked at closely. Emulated tests set it low.
#if !defined(PYDIST_CUDA_CANDIDATES)
#define PYDIST_CUDA_CANDIDATES 2048
#endif

namespace pydist::cuda {

constexpr int kTile = kRun * kBlockThreads;  // elements of a thread block at a time
constexpr int kBitmapWords = kMaxBlock / kWordBits;
constexpr int kIndexWords = kBitmapWords + 2;  // the most that positions take
constexpr int kBins = 2048;
static_assert(kBitmapWords <= kBins, "bins hold a bitmap, too");

constexpr int kMostCandidates = PYDIST_CUDA_CANDIDATES;

struct TopKShared {
  uint32_t bins[kBins];           // of a digit; then bits of ties; then entries before each word
  uint32_t taken[kBitmapWords];   // a bit an element
  uint32_t words[kIndexWords];    // positions of the block, before they are stored
  float values[kMostCandidates];  // elements that may be among the largest, in any order
  uint16_t places[kMostCandidates];
  uint32_t candidates;  // how many there are, or would be
  uint32_t warps[kBlockWarps];
  uint32_t bin, above, inside;  // of a digit: where the k-th largest is
  uint32_t infinite;
};

PYDIST_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }

// The sum over all threads before this one, and over all. Every thread calls it.
PYDIST_DEVICE uint32_t sum_before(uint32_t x, TopKShared* s, uint32_t* total) {
  const int lane = lane_id(), warp = thread_id() / kWarpSize;
  uint32_t sum = x;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarpSize - 1) s->warps[warp] = sum;
  __syncthreads();
  uint32_t before = sum - x;
  *total = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) {
    if (w < warp) before += s->warps[w];
    *total += s->warps[w];
  }
  __syncthreads();  // before the next call writes
  return before;
}

// Calls body(row, index, begin, n) for the blocks of this thread block: number in the payload,
// first element in the row, elements. `words` of rows count blocks here.
template <typename Body>
PYDIST_DEVICE void for_topk_blocks(const Rows& rows, int block, const Body& body) {
  for (int64_t work = blockIdx.x; work < rows.words; work += gridDim.x) {
    const Row row = row_at(rows, find_row(rows, work));
    const int64_t k = work - row.words_before;
    const int64_t begin = k * block;
    const int64_t rest = row.n - begin;
    body(row, row.word + k, begin, static_cast<int>(rest < block ? rest : block));
    __syncthreads();  // shared memory is free again
  }
}

PYDIST_DEVICE void raise_topk(uint32_t* flags, uint32_t raised) {
  if (flags && raised && thread_id() == 0) atomicOr(flags, raised);
}

// Launches kernel(rows, args...), a thread block a block, but at most `most` of them.
template <typename... Params, typename... Args>
void launch_topk(const char* name, void (*kernel)(Rows, Params...), const Rows& rows, int64_t most,
                 void* stream, Args&&... args) {
  if (rows.words <= 0) return;
  int64_t grid = rows.words < most ? rows.words : most;
  grid = grid < PYDIST_CUDA_MAX_BLOCKS ? grid : PYDIST_CUDA_MAX_BLOCKS;
  launch(name, kernel, static_cast<unsigned>(grid), kBlockThreads, stream, rows,
         std::forward<Args>(args)...);
}

}  // namespace pydist::cuda
