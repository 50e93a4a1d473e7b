// elias_encode and elias_decode: the codes of blocks as Elias-coded streams, and back.
//
// Encoding takes three launches: a warp a block counts the bytes of its stream, one block of
// threads sums them up to where each stream ends, a warp a block writes. What the first has found
// out waits for the third where scales go. Decoding takes one launch: words of variable length
// follow from one another, so a thread decodes a block, and the table of ends lets all threads
// begin at once.
#include "../../wire/elias.h"
#include "blocks.cuh"

// Threads that sum up the bytes of streams. Emulated tests have fewer, and so several rounds.
#if !defined(PYDIST_CUDA_SCAN_THREADS)
#define PYDIST_CUDA_SCAN_THREADS 1024
#endif

namespace pydist::cuda {
namespace {

PYDIST_DEVICE unsigned lanes_below(int lane) { return (1u << lane) - 1u; }

template <typename T>
PYDIST_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// The sum over this lane and those below.
PYDIST_DEVICE int warp_scan(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// ------------------------------------------------------------ what a block holds

// A block's levels, a warp's width at a time.
struct Levels {
  const unsigned char* codes;
  int bits, top, n;

  PYDIST_DEVICE_MEMBER Levels(const EliasArgs& a, int64_t index, int elements)
      : codes(a.codes + index * block_bytes(a.format)),
        bits(a.format.bits),
        top(top_of(a.format)),
        n(elements) {}

  PYDIST_DEVICE_MEMBER uint32_t code(int i) const {  // no larger than 2 * top
    const int bit = i * bits;
    const unsigned char* p = codes + bit / 8;
    const uint32_t two = bit % 8 + bits > 8 ? p[0] | static_cast<uint32_t>(p[1]) << 8 : p[0];
    const uint32_t found = two >> (bit % 8) & ((1u << bits) - 1u);
    const uint32_t most = 2u * static_cast<uint32_t>(top);
    return found < most ? found : most;
  }
};

// The gaps between nonzero levels of a step of 32; `before` is the last nonzero one's place so far.
struct Gaps {
  unsigned nonzero;  // lanes
  int gap;           // of this lane, where its level is not zero

  PYDIST_DEVICE_MEMBER Gaps(int level, int base, int lane, int* before) {
    nonzero = __ballot_sync(kAllLanes, level != 0);
    const unsigned below = nonzero & lanes_below(lane);
    const int last = below ? base + 31 - __clz(static_cast<int>(below)) : *before;
    gap = base + lane - last;
    if (nonzero) *before = base + 31 - __clz(static_cast<int>(nonzero));
  }
};

// The shortest stream of a block, and how many of its levels are not zero.
struct Measure {
  StreamMode mode;
  int nonzero;
  int64_t bits;

  PYDIST_DEVICE_MEMBER uint32_t packed() const {  // without the bits
    return static_cast<uint32_t>(mode) | static_cast<uint32_t>(nonzero) << kModeBits;
  }
};

PYDIST_DEVICE StreamMode mode_of(uint32_t packed) {
  return static_cast<StreamMode>(packed & ((1u << kModeBits) - 1u));
}
PYDIST_DEVICE int nonzero_of(uint32_t packed) { return static_cast<int>(packed >> kModeBits); }

// The same on all lanes.
PYDIST_DEVICE Measure measure(const Levels& x, int lane) {
  int dense = 0, sparse = 0, before = -1, nonzero = 0;  // below 2^22 a block
#pragma unroll 1
  for (int base = 0; base < x.n; base += kWarpSize) {
    const int i = base + lane;
    const int level = i < x.n ? static_cast<int>(x.code(i)) - x.top : 0;
    const Gaps gaps(level, base, lane, &before);
    nonzero += __popc(gaps.nonzero);
    if (level) {
      const uint32_t magnitude = magnitude_of(level);
      dense += omega_length(magnitude + 1) + 1;
      sparse += omega_length(static_cast<uint32_t>(gaps.gap)) + 1 + omega_length(magnitude);
    } else if (i < x.n) {
      ++dense;
    }
  }
  dense = kModeBits + warp_sum(dense);
  sparse = kModeBits + warp_sum(sparse) + omega_length(static_cast<uint32_t>(nonzero) + 1);
  Measure found = {StreamMode::kPlain, nonzero, 0};
  found.mode = shortest(sparse, dense, kModeBits + static_cast<int64_t>(x.n) * x.bits, &found.bits);
  return found;
}

// ------------------------------------------------------------ counting and summing

// Leaves each block's bytes in ends, and its measure in scales.
__global__ void __launch_bounds__(kBlockThreads) elias_count_kernel(Rows rows, EliasArgs a) {
  const int lane = lane_id();
  for_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const int64_t j = row.words_before + begin / a.format.block;
    const uint32_t scale = load_word(a.fixed_scales + 4 * index);
    Measure found = {StreamMode::kPlain, 0, 0};
    if (!is_nan_scale(scale)) found = measure(Levels(a, index, n), lane);
    if (lane) return;
    store_word(a.scales + 4 * j, found.packed());
    store_word(a.ends + 4 * j, static_cast<uint32_t>((found.bits + 7) / 8));
  });
}

constexpr int kScanThreads = PYDIST_CUDA_SCAN_THREADS;
constexpr int kScanWarps = kScanThreads / kWarpSize;
constexpr int kScanEach = 8;  // consecutive blocks of a thread
static_assert(kScanWarps <= kWarpSize, "a lane adds up a warp's sums");

// The sum over the threads before this one, and over all; `totals` has a place a warp. All threads
// call it together; two calls in a row need two places.
PYDIST_DEVICE int scan_threads(int own, int* totals, int* all) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int sum = warp_scan(own, lane);
  if (lane == kWarpSize - 1) totals[warp] = sum;
  __syncthreads();
  const int warps = warp_scan(lane < kScanWarps ? totals[lane] : 0, lane);
  *all = __shfl_sync(kAllLanes, warps, kWarpSize - 1);
  const int before = __shfl_sync(kAllLanes, warps, warp ? warp - 1 : 0);
  return (warp ? before : 0) + sum - own;
}

// ends[j] = ends[0] + ... + ends[j], in one block of threads, and the padding behind the last
// stream.
__global__ void __launch_bounds__(kScanThreads) elias_scan_kernel(EliasArgs a, int64_t blocks) {
  __shared__ int totals[2][kScanWarps];
  int64_t carried = 0;
  int round = 0;
#pragma unroll 1
  for (int64_t base = 0; base < blocks; base += kScanThreads * kScanEach, round ^= 1) {
    const int64_t first = base + kScanEach * static_cast<int64_t>(threadIdx.x);
    int bytes[kScanEach], sum = 0, all;  // of all threads below 2^30
#pragma unroll
    for (int k = 0; k < kScanEach; ++k) {
      bytes[k] = first + k < blocks ? static_cast<int>(load_word(a.ends + 4 * (first + k))) : 0;
      sum += bytes[k];
    }
    int64_t until = carried + scan_threads(sum, totals[round], &all);
#pragma unroll
    for (int k = 0; k < kScanEach; ++k) {
      until += bytes[k];
      if (first + k < blocks) store_word(a.ends + 4 * (first + k), static_cast<uint32_t>(until));
    }
    carried += all;
  }
  if (threadIdx.x) return;
  *a.result = carried;
  for (int64_t at = carried; at % 4; ++at) a.streams[at] = 0;
}

// ------------------------------------------------------------ writing

// Bits of a warp's step, and what the step before left over: 32 words of at most 42 bits.
constexpr int kStepWords = 32 * 42 / 32 + 3;

struct WarpWriter {
  uint32_t* room;  // shared, kStepWords; zeros behind the bits that are held
  unsigned char* out;
  int held;  // bits, fewer than 32

  // All lanes' words, in the order of the lanes.
  PYDIST_DEVICE_MEMBER void put(BitCode code, int lane) {
    const int until = held + warp_scan(code.length, lane);
    const int from = until - code.length;
    if (code.length) {
      const int shift = from % 32;
      uint32_t* word = room + from / 32;
      const uint64_t low = code.bits << shift;
      const uint64_t high = shift ? code.bits >> (64 - shift) : 0;
      atomicOr(word, static_cast<uint32_t>(low));
      if (low >> 32) atomicOr(word + 1, static_cast<uint32_t>(low >> 32));
      if (high) atomicOr(word + 2, static_cast<uint32_t>(high));
    }
    __syncwarp();
    const int all = __shfl_sync(kAllLanes, until, kWarpSize - 1);
    const int full = all / 32;
    for (int w = lane; w < full; w += kWarpSize) store_word(out + 4 * w, room[w]);
    const uint32_t rest = room[full];
    __syncwarp();
    for (int w = lane; w <= full; w += kWarpSize) room[w] = w ? 0u : rest;
    __syncwarp();
    out += 4 * full;
    held = all % 32;
  }

  PYDIST_DEVICE_MEMBER void finish(int lane) {  // padded to a whole byte
    if (8 * lane < held) out[lane] = static_cast<unsigned char>(room[0] >> (8 * lane));
    __syncwarp();
    if (lane == 0) room[0] = 0;
    __syncwarp();
  }
};

PYDIST_DEVICE BitCode head_of(StreamMode mode, int nonzero) {
  const BitCode code = {static_cast<uint64_t>(mode), kModeBits};
  if (mode != StreamMode::kSparse) return code;
  return joined(code, omega(static_cast<uint32_t>(nonzero) + 1));
}

__global__ void __launch_bounds__(kBlockThreads) elias_write_kernel(Rows rows, EliasArgs a) {
  __shared__ uint32_t rooms[kBlockWarps][kStepWords];
  const int lane = lane_id();
  uint32_t* room = rooms[threadIdx.x / kWarpSize];
  for (int w = lane; w < kStepWords; w += kWarpSize) room[w] = 0;
  __syncwarp();
  for_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const int64_t j = row.words_before + begin / a.format.block;
    const uint32_t scale = load_word(a.fixed_scales + 4 * index);
    const uint32_t measured = load_word(a.scales + 4 * j);
    __syncwarp();  // all lanes have read what goes
    if (lane == 0) store_word(a.scales + 4 * j, scale);
    if (is_nan_scale(scale)) return;
    const Levels x(a, index, n);
    const StreamMode mode = mode_of(measured);
    int before = -1;
    WarpWriter writer = {room, a.streams + (j ? load_word(a.ends + 4 * (j - 1)) : 0u), 0};
    writer.put(lane ? BitCode{0, 0} : head_of(mode, nonzero_of(measured)), lane);
#pragma unroll 1
    for (int base = 0; base < n; base += kWarpSize) {
      const int i = base + lane;
      const uint32_t code = i < n ? x.code(i) : static_cast<uint32_t>(x.top);
      const int level = static_cast<int>(code) - x.top;
      const Gaps gaps(level, base, lane, &before);
      BitCode word = {0, 0};
      if (mode == StreamMode::kSparse) {
        if (level) {
          word = joined(omega(static_cast<uint32_t>(gaps.gap)),
                        signed_omega(level > 0, magnitude_of(level)));
        }
      } else if (i < n) {
        word = mode == StreamMode::kDense ? dense_code(level) : BitCode{code, x.bits};
      }
      writer.put(word, lane);
    }
    writer.finish(lane);
  });
}

// ------------------------------------------------------------ reading

// Codes to their fixed places, a word at a time.
struct CodeSink {
  unsigned char* out;
  int width;
  uint32_t zero;
  uint64_t bits;
  int have;

  PYDIST_DEVICE_MEMBER void put(uint32_t code) {
    bits |= static_cast<uint64_t>(code) << have;
    have += width;
    if (have >= 32) flush();
  }
  PYDIST_DEVICE_MEMBER void flush() {
    store_word(out, static_cast<uint32_t>(bits));
    out += 4;
    bits >>= 32;
    have -= 32;
  }
  PYDIST_DEVICE_MEMBER void zeros(int count) {
    for (int i = 0; i < count; ++i) put(zero);
  }
};

PYDIST_DEVICE Fault decode_stream(const BlockFormat& f, const unsigned char* begin,
                                  const unsigned char* end, int n, CodeSink& sink) {
  const int top = top_of(f);
  BitReader r = bit_reader(begin, end);
  uint32_t mode;
  Fault fault = read_bits(r, kModeBits, &mode);
  if (fault) return fault;
  if (mode > static_cast<uint32_t>(StreamMode::kPlain)) return kBadMode;
  if (mode == static_cast<uint32_t>(StreamMode::kSparse)) {
    fault = read_sparse(r, n, top, sink);
  } else {
    const bool dense = mode == static_cast<uint32_t>(StreamMode::kDense);
    for (int i = 0; i < n && !fault; ++i) {
      uint32_t code;
      fault = dense ? read_dense_level(r, top, &code) : read_plain_level(r, f.bits, top, &code);
      if (!fault) sink.put(code);
    }
  }
  return fault ? fault : read_end(r);
}

// As find_row, but for a thread alone.
PYDIST_DEVICE Row row_of(const Rows& rows, int64_t work) {
  if (!rows.table) return rows.only;
  int64_t low = 0, high = rows.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    const bool below = rows.table[middle].words_before <= work;
    low = below ? middle : low;
    high = below ? high : middle;
  }
  return rows.table[low];
}

PYDIST_DEVICE Fault decode_block(const EliasArgs& a, const Row& row, int64_t j, int64_t blocks) {
  const BlockFormat& f = a.format;
  const int64_t k = j - row.words_before, index = row.word + k;
  const int64_t rest = row.n - k * f.block;
  const int n = static_cast<int>(rest < f.block ? rest : f.block);
  const int64_t begin = j ? load_word(a.ends + 4 * (j - 1)) : 0u;
  const int64_t end = load_word(a.ends + 4 * j);
  const uint32_t scale = load_word(a.scales + 4 * j);
  Fault fault = check_place(a, begin, end, n, scale);
  const int64_t at = index * block_bytes(f), left = a.code_bytes - at;
  const int64_t room = left < block_bytes(f) ? left : block_bytes(f);
  unsigned char* out = a.codes + at;
  CodeSink sink = {out, f.bits, static_cast<uint32_t>(top_of(f)), 0, 0};
  if (!fault && begin < end) {
    fault = decode_stream(f, a.streams + begin, a.streams + end, n, sink);
    if (sink.have > 0) sink.flush();
  }
  for (int64_t b = fault ? 0 : sink.out - out; b < room; b += 4) store_word(out + b, 0);
  store_word(a.fixed_scales + 4 * index, scale);
  if (!fault && j == blocks - 1 && !padded_to_word(a, end)) fault = kLeftOver;
  return fault;
}

__global__ void __launch_bounds__(kBlockThreads) elias_decode_kernel(Rows rows, EliasArgs a) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; j < rows.words;
       j += threads) {
    const Fault fault = decode_block(a, row_of(rows, j), j, rows.words);
    if (fault) atomicMin(reinterpret_cast<long long*>(a.result), fault_at(j, fault));
  }
}

}  // namespace

void elias_encode(const Rows& rows, const EliasArgs& args, void* stream) {
  launch_blocks("elias_encode", elias_count_kernel, rows, stream, args);
  launch("elias_encode", elias_scan_kernel, 1, kScanThreads, stream, args, rows.words);
  launch_blocks("elias_encode", elias_write_kernel, rows, stream, args);
}

void elias_decode(const Rows& rows, const EliasArgs& args, void* stream) {
  // A thread a block of elements; the tiles are a warp's.
  launch_over<kWarpSize>("elias_decode", elias_decode_kernel, rows, stream, args);
}

}  // namespace pydist::cuda
