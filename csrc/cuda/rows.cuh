// Who works on what: tiles of payload words to warps, tiles to chunks of rows.
//
// The words of all rows, one row after another, are the work; `Row.words_before` is where a row
// starts in it (its place in memory, `Row.word`, may leave gaps). A warp takes tiles of kTileWords
// such words. Every row is cut into chunks of kTileWords words from its own start; a chunk belongs
// to the tile in which it starts: all chunks but a row's last are whole, and none straddles two
// rows.
#pragma once

#include "common.cuh"

namespace pydist::cuda {

PYDIST_DEVICE Row row_at(const Rows& rows, int64_t r) {
  // Not `?:`, which would take the address of a kernel parameter and copy it to local memory.
  if (rows.table) return rows.table[r];
  return rows.only;
}

// The row that holds a word of the work: the last whose `words_before` is not above it (rows
// without elements share theirs with the next row, and the last of equals has the elements). The
// warp probes 32 rows at a time, so a thousand rows take two loads one after another.
PYDIST_DEVICE int64_t find_row(const Rows& rows, int64_t word) {
  if (!rows.table) return 0;
  int64_t low = 0, high = rows.count;  // the answer is in [low, high)
  while (high - low > 1) {
    const int64_t step = (high - low + kWarpSize - 1) / kWarpSize;
    const int64_t probe = low + lane_id() * step;
    const bool below = probe < high && rows.table[probe].words_before <= word;
    const int last = __popc(__ballot_sync(kAllLanes, below)) - 1;
    low += (last < 0 ? 0 : last) * step;
    high = low + step < high ? low + step : high;
  }
  return low;
}

// Calls body(row, start) for every chunk of this warp; `start` is the chunk's first word within the
// row. A word has `elements`, and a tile tile_words(), a power of two. All lanes of a warp make the
// same calls.
template <typename Size, typename Body>
PYDIST_DEVICE void for_chunks(const Rows& rows, const Size& tile_words, int elements,
                              const Body& body) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarpSize;
  int64_t begin = tile * tile_words();
  for (; begin < rows.words;
       begin += static_cast<int64_t>(gridDim.x) * kBlockWarps * tile_words()) {
    const int words = tile_words();
    for (int64_t r = find_row(rows, begin); r < rows.count; ++r) {
      const Row row = row_at(rows, r);
      const int64_t ahead = begin - row.words_before;  // words of this row before the tile
      if (ahead <= -words) break;
      const int64_t start = ahead > 0 ? (ahead + words - 1) & -words : int64_t{0};
      if (start * elements < row.n) body(row, start);
    }
  }
}
template <int kTileWords, typename Body>
PYDIST_DEVICE void for_chunks(const Rows& rows, const Body& body) {
  for_chunks(rows, [] { return kTileWords; }, kWordBits, body);
}

// Elements of the chunk that starts at word `start` of a row.
template <int kTileWords>
PYDIST_DEVICE int chunk_elements(const Row& row, int64_t start) {
  const int64_t rest = row.n - start * kWordBits;
  return static_cast<int>(rest < kTileWords * kWordBits ? rest : kTileWords * kWordBits);
}

// Blocks for all tiles, or as many as are worth having.
inline unsigned grid_for(const Rows& rows, int tile_words) {
  const int64_t per_block = static_cast<int64_t>(tile_words) * kBlockWarps;
  const int64_t blocks = (rows.words + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < PYDIST_CUDA_MAX_BLOCKS ? blocks : PYDIST_CUDA_MAX_BLOCKS);
}

// Launches kernel(rows, args...) over all tiles, if there are any.
template <typename... Params, typename... Args>
void launch_tiles(const char* name, void (*kernel)(Rows, Params...), const Rows& rows,
                  int tile_words, void* stream, Args&&... args) {
  if (rows.words <= 0) return;
  launch(name, kernel, grid_for(rows, tile_words), kBlockThreads, stream, rows,
         std::forward<Args>(args)...);
}
template <int kTileWords, typename... Params, typename... Args>
void launch_over(const char* name, void (*kernel)(Rows, Params...), const Rows& rows, void* stream,
                 Args&&... args) {
  launch_tiles(name, kernel, rows, kTileWords, stream, std::forward<Args>(args)...);
}

// The tile of kernels that touch elements; votes, which touch words only, take larger ones.
constexpr int kElementTile = kWarpSize;
constexpr int kElementChunk = kElementTile * kWordBits;

}  // namespace pydist::cuda
