// What the kernels of top-k blocks share. A thread block takes a block of elements.
#pragma once

#include "../../wire/blocks.h"
#include "../../wire/topk.h"
#include "../sources.cuh"

namespace pydist::cuda {

constexpr int kTile = kRun * kBlockThreads;  // elements of a thread block at a time
constexpr int kBins = 2048;
constexpr int kIndexWords = kMaxBlock / kWordBits + 2;  // the most that positions take

struct TopKShared {
  uint32_t bins[kBins];
  uint32_t words[kIndexWords];  // positions of the block, before they are stored
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

// ------------------------------------------------------------ which entries

// The digit of `kWidth` bits from kShift on that the wanted-th largest magnitude has, among those
// whose higher bits are `prefix`. Leaves bin, above, inside.
template <int kShift, int kWidth, typename Source>
PYDIST_DEVICE void find_digit(const Source& x, int n, uint32_t prefix, int wanted, TopKShared* s) {
  constexpr int kCount = 1 << kWidth;
  constexpr int kEach = kCount / kBlockThreads;
  for (int b = thread_id(); b < kCount; b += kBlockThreads) s->bins[b] = 0;
  __syncthreads();
  for (int i = kRun * thread_id(); i < n; i += kTile) {
    Run v;
    x.run(i, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t m = float_bits(v[j]) & kAbsMask;
      if (i + j < n && m >> (kShift + kWidth) == prefix) {
        atomicAdd(&s->bins[(m >> kShift) & (kCount - 1u)], 1u);
      }
    }
  }
  __syncthreads();
  const int top = kCount - 1 - kEach * thread_id();  // this thread's bins, downwards
  uint32_t sum = 0, total;
#pragma unroll
  for (int b = 0; b < kEach; ++b) sum += s->bins[top - b];
  uint32_t above = sum_before(sum, s, &total);
  if (above < static_cast<uint32_t>(wanted) && static_cast<uint32_t>(wanted) <= above + sum) {
    int b = top;
    for (; above + s->bins[b] < static_cast<uint32_t>(wanted); --b) above += s->bins[b];
    s->bin = static_cast<uint32_t>(b);
    s->above = above;
    s->inside = s->bins[b];
  }
  __syncthreads();
}

struct Threshold {
  bool finite;
  uint32_t magnitude;
  TopKTies ties;
};

// The k-th largest magnitude, and which of its equals are taken.
template <typename Source>
PYDIST_DEVICE Threshold find_threshold(const Source& x, int n, int k, int turn, TopKShared* s) {
  find_digit<20, 11>(x, n, 0u, k, s);
  constexpr int kInfinite = kInfBits >> 20;  // the first digit of what is not finite
  if (thread_id() == 0) {
    uint32_t infinite = 0;
    for (int b = kInfinite; b < kBins; ++b) infinite |= s->bins[b];
    s->infinite = infinite;
  }
  uint32_t magnitude = s->bin;
  int wanted = k - static_cast<int>(s->above);
  __syncthreads();
  if (s->infinite) return {false, 0u, {0, 0, 0, 0}};
  find_digit<10, 10>(x, n, magnitude, wanted, s);
  magnitude = magnitude << 10 | s->bin;
  wanted -= static_cast<int>(s->above);
  __syncthreads();
  find_digit<0, 10>(x, n, magnitude, wanted, s);
  magnitude = magnitude << 10 | s->bin;
  wanted -= static_cast<int>(s->above);
  const int ties = static_cast<int>(s->inside);
  if (wanted == ties) return {true, magnitude, {0, wanted, 0, ties}};
  uint32_t below = 0, total;
  for (int i = kRun * thread_id(); i < turn; i += kTile) {
    Run v;
    x.run(i, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      below += i + j < turn && (float_bits(v[j]) & kAbsMask) == magnitude ? 1u : 0u;
    }
  }
  sum_before(below, s, &total);
  return {true, magnitude, {turn, wanted, static_cast<int>(total), ties}};
}

// ------------------------------------------------------------ bytes

// Entry i of a block: its value, and its position in the shared words.
PYDIST_DEVICE void put_entry(const TopKFormat& f, const TopKLayout& layout, unsigned char* block,
                             TopKShared* s, int i, int position, float value) {
  if (f.values == DType::kFloat32) {
    store_word(block + 4 * i, float_bits(value));
  } else {
    const uint32_t bits = f.values == DType::kFloat16 ? held_half(value) : held_bfloat(value);
    block[2 * i] = static_cast<unsigned char>(bits);
    block[2 * i + 1] = static_cast<unsigned char>(bits >> 8);
  }
  const auto p = static_cast<uint32_t>(position);
  uint32_t at = p;
  if (f.low_bits != kBitmap) {
    const uint32_t part = p & ((1u << f.low_bits) - 1u);
    const int first = i * f.low_bits, word = first / kWordBits, shift = first % kWordBits;
    atomicOr(&s->words[word], part << shift);
    if (shift + f.low_bits > kWordBits) {
      atomicOr(&s->words[word + 1], part >> (kWordBits - shift));
    }
    at = (p >> f.low_bits) + static_cast<uint32_t>(i);
  }
  atomicOr(&s->words[layout.high - layout.low + static_cast<int>(at) / kWordBits],
           1u << (at % kWordBits));
}

struct TopKKeepNothing {
  PYDIST_DEVICE_MEMBER void operator()(int, const Run&, uint32_t) const {}
};

// Stores the entries that a threshold selects; calls kept(i, v, taken) for every run.
template <typename Source, typename Kept>
PYDIST_DEVICE void put_entries(const Source& x, const TopKFormat& f, const TopKLayout& layout,
                               const Threshold& t, unsigned char* block, TopKShared* s,
                               const Kept& kept) {
  int greater_before = 0, ties_before = 0;
#pragma unroll 1
  for (int base = 0; base < layout.n; base += kTile) {
    const int i = base + kRun * thread_id();
    Run v = {};
    if (i < layout.n) x.run(i, v);
    uint32_t greater = 0, tied = 0;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t m = float_bits(v[j]) & kAbsMask;
      const bool inside = i + j < layout.n;
      greater |= inside && m > t.magnitude ? 1u << j : 0u;
      tied |= inside && m == t.magnitude ? 1u << j : 0u;
    }
    uint32_t total;
    const uint32_t counts = static_cast<uint32_t>(__popc(greater) | __popc(tied) << 16);
    const uint32_t before = sum_before(counts, s, &total);
    int number = ties_before + static_cast<int>(before >> 16);
    int above = greater_before + static_cast<int>(before & 0xFFFFu);
    uint32_t taken = greater;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const bool tie = tied >> j & 1u;
      if (tie && takes_tie(t.ties, i + j, number)) taken |= 1u << j;
      if (taken >> j & 1u) {
        put_entry(f, layout, block, s, above + taken_before(t.ties, i + j, number), i + j, v[j]);
      }
      number += tie ? 1 : 0;
      above += greater >> j & 1u ? 1 : 0;
    }
    if (i < layout.n) kept(i, v, taken);
    greater_before += static_cast<int>(total & 0xFFFFu);
    ties_before += static_cast<int>(total >> 16);
  }
}

// Encodes one block. All threads call it together. Returns whether the block is finite.
template <typename Source, typename Kept>
PYDIST_DEVICE bool select_block(const Source& x, const TopKEncode& a, const Row& row, int64_t index,
                                int64_t begin, int n, TopKShared* s, const Kept& kept) {
  const TopKFormat& f = a.format;
  const TopKLayout layout = topk_layout(f, n);
  const int index_words = layout.words - layout.low;
  for (int w = thread_id(); w < index_words; w += kBlockThreads) s->words[w] = 0;
  const int turn = topk_turn(a.seed, static_cast<uint32_t>(step_of(a)), row.ordinal,
                             (row.first + begin) / f.block, n);
  const Threshold t = find_threshold(x, n, layout.k, turn, s);
  const int64_t size = topk_block_bytes(f);
  const int64_t left = a.bytes - index * size;
  unsigned char* block = a.payload + index * size;
  __syncthreads();
  if (t.finite) {
    put_entries(x, f, layout, t, block, s, kept);
  } else {
    for (int i = thread_id(); i < layout.k; i += kBlockThreads) {
      put_entry(f, layout, block, s, i, i, bits_float(kNanBits));
    }
  }
  if (thread_id() < 2 && f.values != DType::kFloat32 && layout.k % 2) {
    block[2 * layout.k + thread_id()] = 0;
  }
  __syncthreads();
  const int room = static_cast<int>((left < size ? left : size) / 4);
  for (int w = layout.low + thread_id(); w < room; w += kBlockThreads) {
    store_word(block + 4 * w, w < layout.words ? s->words[w - layout.low] : 0u);
  }
  return t.finite;
}

}  // namespace pydist::cuda
