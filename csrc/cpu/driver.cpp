#include "driver.h"

#if defined(PYDIST_X86)
#include <cpuid.h>
#elif defined(PYDIST_AARCH64)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "../wire/message.h"
#include "cache_size.h"
#include "float_mode.h"
#include "thread_pool.h"

namespace pydist::cpu {
namespace {

// ------------------------------------------------------------ which instruction set

#if defined(PYDIST_X86)
constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // registers, as bits of XCR0

// Whether the processor has F16C and these features of cpuid's leaf 7, and the system saves these
// registers. __builtin_cpu_supports() answers from the compiler's runtime library: that of clang 14
// does not know f16c, and zig's says no to everything.
bool can_run(unsigned features, unsigned registers) {
  constexpr unsigned needed = bit_OSXSAVE | bit_F16C;
  unsigned a = 0, b = 0, c = 0, d = 0, saved = 0, saved_high = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return false;
  __asm__("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
  return (saved & registers) == registers && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (b & features) == features;
}
#endif

std::vector<const Kernels*> supported_tables() {
  std::vector<const Kernels*> tables = {&kScalar};
#if defined(PYDIST_X86)
  if (can_run(bit_AVX2, kYmm)) tables.push_back(&kAvx2);
  constexpr unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if (can_run(bit_AVX2 | avx512, kZmm)) tables.push_back(&kAvx512);
#elif defined(PYDIST_AARCH64)
  // Every AArch64 has vectors; what counts checksums came with the first revision.
  if (getauxval(AT_HWCAP) & HWCAP_CRC32) tables.push_back(&kNeon);
#endif
  return tables;
}

const Kernels* find_table(const std::string& name) {
  std::string known;
  for (const Kernels* table : supported_tables()) {
    if (name == table->name) return table;
    known += known.empty() ? table->name : std::string(", ") + table->name;
  }
  throw std::invalid_argument("PYDIST_ISA: '" + name +
                              "' is not an instruction set of this build and processor; have " +
                              known);
}

std::atomic<const Kernels*> active{nullptr};

const Kernels& kernels() {
  if (const Kernels* table = active.load()) return *table;
  const char* forced = std::getenv("PYDIST_ISA");
  const Kernels* table = forced && *forced ? find_table(forced) : supported_tables().back();
  active.store(table);
  return *table;
}

// ------------------------------------------------------------ rows to pieces

constexpr int64_t kTaskWords = 4096;   // 131,072 elements: small enough to share out, large enough
                                       // that taking a task costs nothing
constexpr int64_t kTasksAThread = 16;  // a slow thread leaves the last ones to the others

// Units (words, blocks) of a task: of large arrays each thread gets long runs, since what a kernel
// has prefetched beyond the end of its run is in the wrong core's cache.
int64_t task_units(int64_t total, int threads, int64_t unit) {
  const int64_t share = total / (std::max(threads, 1) * kTasksAThread);
  const int64_t fewest = std::max<int64_t>(kTaskWords * kWordBits / unit, 1);
  return std::max<int64_t>(share / fewest, 1) * fewest;
}

// Calls piece(row, from, n) for the n elements from element `from` on of every row, cut at task
// boundaries. What is cut stays whole in units of `unit` elements.
template <typename Piece>
void for_pieces(const Row* rows, int64_t n_rows, int threads, const Piece& piece,
                int64_t unit = kWordBits) {
  std::vector<int64_t> start(n_rows + 1, 0);  // units before each row
  for (int64_t r = 0; r < n_rows; ++r) start[r + 1] = start[r] + (rows[r].n + unit - 1) / unit;
  const int64_t total = start[n_rows];
  const int64_t size = task_units(total, threads, unit);
  const auto task = [&](int64_t t) {
    const DefaultFloatMode mode;
    const int64_t begin = t * size;
    const int64_t end = std::min(total, begin + size);
    int64_t r = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; r < n_rows && start[r] < end; ++r) {
      const int64_t from = std::max<int64_t>(begin - start[r], 0) * unit;
      const int64_t to = std::min(rows[r].n, (end - start[r]) * unit);
      if (from < to) piece(rows[r], from, to - from);
    }
  };
  parallel_for((total + size - 1) / size, threads, task);
}

int64_t width_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether a call writes so much that it goes past the caches: the memory it overwrites is then not
// read first.
bool past_caches(const Row* rows, int64_t n_rows, DType dtype) {
  int64_t bytes = 0;
  for (int64_t r = 0; r < n_rows; ++r) bytes += rows[r].n * width_of(dtype);
  return bytes > stream_limit().load(std::memory_order_relaxed);
}

void raise_flags(uint32_t* flags, uint32_t value) {
  if (flags && value) __atomic_fetch_or(flags, value, __ATOMIC_RELAXED);
}

// Room for the floats of two blocks, this thread's own.
float* block_scratch(int block) {
  constexpr size_t kAlignment = 64 / sizeof(float);
  thread_local std::unique_ptr<float[]> room;
  thread_local int held = 0;
  if (held < block) {
    room.reset(new float[2 * static_cast<size_t>(block) + kAlignment]);
    held = block;
  }
  const size_t past = reinterpret_cast<uintptr_t>(room.get()) / sizeof(float) % kAlignment;
  return room.get() + (kAlignment - past) % kAlignment;
}

// The words of a vote as a row of its own: a piece of `row` of n elements from element `from`.
Row vote_piece(const Row& row, int64_t from, int64_t n) {
  Row part = row;
  part.n = n;
  part.word += from / kWordBits;
  part.first += from;
  return part;
}

// The same room, cut for top-k blocks.
TopKRoom topk_room(int block) {
  constexpr int kVector = 64;  // numbers; no vector is longer
  float* room = block_scratch(5 * block / 2 + kVector);
  auto* numbers = reinterpret_cast<uint32_t*>(room + 2 * static_cast<size_t>(block));
  uint32_t* magnitudes = numbers + block + kVector;
  return {room, room + block, numbers, magnitudes, magnitudes + block};
}

// Calls piece(part, scratch) for the pieces of all rows; they start on blocks.
template <typename Piece>
void for_block_pieces(const Row* rows, int64_t n_rows, int block, int threads, const Piece& piece) {
  for_pieces(
      rows, n_rows, threads,
      [&](const Row& row, int64_t from, int64_t n) {
        Row part = row;
        part.n = n;
        part.word += from / block;
        part.first += from;
        piece(part, from, block_scratch(block));
      },
      block);
}

// Calls piece(part) for pieces of whole units; the parts' x has moved by `width` bytes per element.
template <typename Piece>
void for_unit_pieces(const Row* rows, int64_t n_rows, int64_t width, int threads,
                     const Piece& piece) {
  for_pieces(
      rows, n_rows, threads,
      [&](const Row& row, int64_t from, int64_t n) {
        Row part = row;
        part.x += from * width;
        part.n = n;
        part.word += from / kUnit;
        part.first += from;
        piece(part);
      },
      kUnit);
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : supported_tables()) names.emplace_back(table->name);
  return names;
}

std::string current_isa() { return kernels().name; }

void select_isa(const std::string& name) { active.store(find_table(name)); }

int64_t stream_above(int64_t bytes) { return stream_limit().exchange(bytes); }

void pack_signs(const Row* rows, int64_t n_rows, DType dtype, unsigned char* payload,
                uint32_t zero_bit, uint32_t* flags, int threads) {
  const auto kernel = kernels().pack_signs[static_cast<int>(dtype)];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    const void* x = reinterpret_cast<const void*>(row.x + from * width_of(dtype));
    raise_flags(flags,
                kernel(x, n, payload + row.message + 4 * (row.word + from / kWordBits), zero_bit));
  });
}

void lion_pack(const Row* rows, int64_t n_rows, DType grad, DType momentum, unsigned char* payload,
               const LionPackArgs& args, uint32_t* flags, int threads) {
  const auto kernel =
      kernels().lion_pack[static_cast<int>(grad)][momentum == DType::kFloat32 ? 0 : 1];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    Row part = vote_piece(row, from, n);
    part.x += from * width_of(grad);
    part.momentum += from * width_of(momentum);
    part.momentum_out += from * width_of(momentum);
    raise_flags(flags, kernel(part, payload + part.message + 4 * part.word, args));
  });
}

void lion_apply(const Row* rows, int64_t n_rows, DType dtype, const unsigned char* planes,
                const LionApplyArgs& args, int threads) {
  const auto kernel = kernels().lion_apply[static_cast<int>(dtype)];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    void* param = reinterpret_cast<void*>(row.x + from * width_of(dtype));
    kernel(param, n, planes + row.message + 4 * (row.word + from / kWordBits), args);
  });
}

void unpack_votes(const Row* rows, int64_t n_rows, DType dtype, const Unpack& args, int threads) {
  const auto kernel = kernels().unpack_votes[static_cast<int>(dtype)];
  const bool streams = past_caches(rows, n_rows, dtype);
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    void* out = reinterpret_cast<void*>(row.x + from * width_of(dtype));
    kernel(out, n, args.planes + row.message + 4 * (row.word + from / kWordBits), args, streams);
  });
}

void count_votes(const Row* rows, int64_t n_rows, const VoteArgs& args, int threads) {
  const auto kernel = kernels().count_votes;
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    kernel(args, vote_piece(row, from, n));
  });
}

void majority_vote(const Row* rows, int64_t n_rows, const VoteArgs& args, int threads) {
  const auto kernel = kernels().majority_vote;
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    kernel(args, vote_piece(row, from, n));
  });
}

BlockFormat block_format(int scheme, int bits, int block, int norm, bool stochastic) {
  const DefaultFloatMode mode;
  const bool levels = static_cast<Scheme>(scheme) == Scheme::kLevels;
  const int top = levels ? (1 << (bits - 1)) - 1 : 1;
  const float high = bits_float(float_bits(round_scalar(1.0 / top)) & ~0x7Fu);
  return {static_cast<Scheme>(scheme),
          bits,
          block,
          static_cast<Norm>(norm),
          stochastic,
          static_cast<float>(top),
          high,
          round_scalar(1.0 / top - high)};
}

void quantize(const Row* rows, int64_t n_rows, DType dtype, const EncodeArgs& args, uint32_t* flags,
              int threads) {
  const auto kernel = kernels().quantize[static_cast<int>(dtype)];
  for_block_pieces(rows, n_rows, args.format.block, threads,
                   [&](Row& part, int64_t from, float* scratch) {
                     part.x += from * width_of(dtype);
                     raise_flags(flags, kernel(part, in_message(args, part), scratch));
                   });
}

void quantize_feedback(const Row* rows, int64_t n_rows, DType dtype, DType residual,
                       const EncodeArgs& args, uint32_t* flags, int threads) {
  const auto kernel =
      kernels().quantize_feedback[static_cast<int>(dtype)][residual == DType::kFloat32 ? 0 : 1];
  const auto plain = kernels().quantize[static_cast<int>(dtype)];
  for_block_pieces(rows, n_rows, args.format.block, threads,
                   [&](Row& part, int64_t from, float* scratch) {
                     part.x += from * width_of(dtype);
                     const EncodeArgs here = in_message(args, part);
                     if (!part.momentum) return raise_flags(flags, plain(part, here, scratch));
                     part.momentum += from * width_of(residual);
                     part.momentum_out += from * width_of(residual);
                     raise_flags(flags, kernel(part, here, scratch));
                   });
}

void reduce_quantized(const Row* rows, int64_t n_rows, const DecodeArgs& from, const EncodeArgs& to,
                      uint32_t* flags, int threads) {
  const auto kernel = kernels().reduce_quantized;
  for_block_pieces(rows, n_rows, from.format.block, threads,
                   [&](Row& part, int64_t, float* scratch) {
                     raise_flags(flags, kernel(part, from, in_message(to, part), scratch));
                   });
}

void dequantize(const Row* rows, int64_t n_rows, DType dtype, const DecodeArgs& args, int threads) {
  const auto kernel = kernels().dequantize[static_cast<int>(dtype)];
  const bool streams = past_caches(rows, n_rows, dtype);
  for_block_pieces(rows, n_rows, args.format.block, threads,
                   [&](Row& part, int64_t from, float* scratch) {
                     part.x += from * width_of(dtype);
                     kernel(part, in_message(args, part), scratch, streams);
                   });
}

void sum_values(const Row* rows, int64_t n_rows, DType from, DType to, const SumArgs& args,
                uint32_t* flags, int threads) {
  const auto kernel = kernels().sum_values[static_cast<int>(from)][static_cast<int>(to)];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t begin, int64_t n) {
    const bool wide_from = from == DType::kFloat32, wide_to = to == DType::kFloat32;
    const int64_t values = wide_from ? values_at<float>(args, row) : values_at<Half>(args, row);
    const int64_t sums = wide_to ? sums_at<float>(args, row) : sums_at<Half>(args, row);
    raise_flags(
        flags,
        kernel(reinterpret_cast<void*>(sums + begin * width_of(to)), n,
               reinterpret_cast<const unsigned char*>(values + begin * width_of(from)), args));
  });
}

namespace {

struct Streams {  // of a piece: where they lie in the room for the longest
  int64_t first, blocks, begin, bytes;
};

// Moves the streams of pieces together; their ends, counted from their own beginnings, become those
// in the payload. Returns where the last one ends.
int64_t move_together(std::vector<Streams>& pieces, const EliasArgs& args) {
  std::sort(pieces.begin(), pieces.end(),
            [](const Streams& a, const Streams& b) { return a.first < b.first; });
  int64_t at = 0;
  for (const Streams& piece : pieces) {
    if (piece.begin != at) std::memmove(args.streams + at, args.streams + piece.begin, piece.bytes);
    for (int64_t j = piece.first; at && j < piece.first + piece.blocks; ++j) {
      uint32_t end;
      std::memcpy(&end, args.ends + 4 * j, 4);
      end += static_cast<uint32_t>(at);
      std::memcpy(args.ends + 4 * j, &end, 4);
    }
    at += piece.bytes;
  }
  return at;
}

}  // namespace

void elias_encode(const Row* rows, int64_t n_rows, const EliasArgs& args, int threads) {
  const auto kernel = kernels().elias_encode;
  const BlockFormat& f = args.format;
  std::vector<int64_t> room(n_rows + 1, 0);  // before each row
  for (int64_t r = 0; r < n_rows; ++r) {
    room[r + 1] = room[r] + rows[r].n / f.block * stream_limit(f, f.block) +
                  (rows[r].n % f.block ? stream_limit(f, rows[r].n % f.block) : 0);
  }
  std::mutex lock;
  std::vector<Streams> pieces;
  for_pieces(
      rows, n_rows, threads,
      [&](const Row& row, int64_t from, int64_t n) {
        Row part = row;
        part.n = n;
        part.word += from / f.block;
        const int64_t begin = room[&row - rows] + from / f.block * stream_limit(f, f.block);
        Streams piece = {row.words_before + from / f.block, (n + f.block - 1) / f.block, begin, 0};
        piece.bytes = kernel(part, args, piece.first, args.streams + begin, block_scratch(f.block));
        const std::lock_guard<std::mutex> held(lock);
        pieces.push_back(piece);
      },
      f.block);
  const int64_t bytes = move_together(pieces, args);
  std::memset(args.streams + bytes, 0, (4 - bytes % 4) % 4);
  *args.result = bytes;
}

void elias_decode(const Row* rows, int64_t n_rows, const EliasArgs& args, int threads) {
  const auto kernel = kernels().elias_decode;
  const BlockFormat& f = args.format;
  std::mutex lock;
  int64_t fault = kNoFault, blocks = 0;
  for (int64_t r = 0; r < n_rows; ++r) blocks += (rows[r].n + f.block - 1) / f.block;
  for_block_pieces(rows, n_rows, f.block, threads, [&](Row& part, int64_t from, float* scratch) {
    const int64_t found = kernel(part, args, part.words_before + from / f.block, scratch);
    if (found == kNoFault) return;
    const std::lock_guard<std::mutex> held(lock);
    fault = std::min(fault, found);
  });
  if (blocks && fault == kNoFault) {
    uint32_t end;
    std::memcpy(&end, args.ends + 4 * (blocks - 1), 4);
    if (!padded_to_word(args, end)) fault = fault_at(blocks - 1, kLeftOver);
  }
  *args.result = fault;
}

void ternary_scale(const Row* rows, int64_t n_rows, DType dtype, const TernaryScaleArgs& args,
                   uint32_t* flags, int threads) {
  const auto kernel = kernels().ternary_segments[static_cast<int>(dtype)];
  for_pieces(
      rows, n_rows, threads,
      [&](const Row& row, int64_t from, int64_t n) {
        const void* x = reinterpret_cast<const void*>(row.x + from * width_of(dtype));
        kernel(x, n, args.scratch + row.word + from / kSumSegment);
      },
      kSumSegment);
  const DefaultFloatMode mode;
  for (int64_t r = 0; r < n_rows; ++r) raise_flags(flags, kernels().ternary_scale(rows[r], args));
}

void ternary_pack(const Row* rows, int64_t n_rows, DType dtype, const TernaryPackArgs& args,
                  uint32_t* flags, int threads) {
  const auto kernel = kernels().ternary_pack[static_cast<int>(dtype)];
  for_unit_pieces(rows, n_rows, width_of(dtype), threads, [&](const Row& part) {
    raise_flags(flags, kernel(part, in_message(args, part)));
  });
}

void ternary_sum(const Row* rows, int64_t n_rows, const TernarySource& from, unsigned char* out,
                 uint32_t* flags, int threads) {
  const auto kernel = kernels().ternary_sum;
  for_unit_pieces(rows, n_rows, 0, threads,
                  [&](const Row& part) { raise_flags(flags, kernel(part, from, out)); });
}

void ternary_unpack(const Row* rows, int64_t n_rows, DType dtype, const TernarySource& from,
                    uint32_t* flags, int threads) {
  const auto kernel = kernels().ternary_unpack[static_cast<int>(dtype)];
  const bool streams = past_caches(rows, n_rows, dtype);
  for_unit_pieces(rows, n_rows, width_of(dtype), threads, [&](const Row& part) {
    raise_flags(flags, kernel(part, in_message(from, part), streams));
  });
}

void ternary_unpack_sums(const Row* rows, int64_t n_rows, DType dtype, const TernarySource& from,
                         uint32_t* flags, int threads) {
  const auto kernel = kernels().ternary_unpack_sums[static_cast<int>(dtype)];
  const bool streams = past_caches(rows, n_rows, dtype);
  for_unit_pieces(rows, n_rows, width_of(dtype), threads, [&](const Row& part) {
    raise_flags(flags, kernel(part, in_message(from, part), streams));
  });
}

void topk_select(const Row* rows, int64_t n_rows, DType dtype, const TopKEncode& args,
                 uint32_t* flags, int threads) {
  const auto kernel = kernels().topk_select[static_cast<int>(dtype)];
  const int block = args.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t from, float*) {
    part.x += from * width_of(dtype);
    raise_flags(flags, kernel(part, in_message(args, part), topk_room(block)));
  });
}

void topk_feedback(const Row* rows, int64_t n_rows, DType dtype, DType residual,
                   const TopKEncode& args, uint32_t* flags, int threads) {
  const auto kernel =
      kernels().topk_feedback[static_cast<int>(dtype)][residual == DType::kFloat32 ? 0 : 1];
  const auto plain = kernels().topk_select[static_cast<int>(dtype)];
  const int block = args.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t from, float*) {
    part.x += from * width_of(dtype);
    const TopKEncode here = in_message(args, part);
    if (!part.momentum) return raise_flags(flags, plain(part, here, topk_room(block)));
    part.momentum += from * width_of(residual);
    part.momentum_out += from * width_of(residual);
    raise_flags(flags, kernel(part, here, topk_room(block)));
  });
}

void topk_reduce(const Row* rows, int64_t n_rows, const TopKDecode& from, const TopKEncode& to,
                 uint32_t* flags, int threads) {
  const auto kernel = kernels().topk_reduce;
  const int block = from.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t, float*) {
    raise_flags(flags, kernel(part, from, in_message(to, part), topk_room(block)));
  });
}

void topk_scatter(const Row* rows, int64_t n_rows, DType dtype, const TopKDecode& args,
                  uint32_t* flags, int threads) {
  const auto kernel = kernels().topk_scatter[static_cast<int>(dtype)];
  const bool streams = past_caches(rows, n_rows, dtype);
  const int block = args.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t from, float*) {
    part.x += from * width_of(dtype);
    raise_flags(flags, kernel(part, in_message(args, part), topk_room(block), streams));
  });
}

uint32_t crc32c(const unsigned char* data, int64_t n, uint32_t before) {
  return kernels().crc32c(data, n, before);
}

void seal_messages(unsigned char* rows, int64_t n_rows, int64_t stride, int64_t bytes) {
  for (int64_t r = 0; r < n_rows; ++r, rows += stride) {
    const uint32_t crc = crc32c(rows, bytes, 0);
    std::memcpy(rows + kChecksumAt, &crc, kChecksumBytes);
  }
}

int64_t first_damaged(const unsigned char* rows, int64_t n_rows, int64_t stride, int64_t bytes,
                      uint32_t digest) {
  constexpr int64_t kBehind = kChecksumAt + kChecksumBytes;
  unsigned char field[kChecksumBytes];
  std::memcpy(field, &digest, kChecksumBytes);
  for (int64_t r = 0; r < n_rows; ++r, rows += stride) {
    uint32_t crc = crc32c(rows, kChecksumAt, 0);
    crc = crc32c(field, kChecksumBytes, crc);
    crc = crc32c(rows + kBehind, bytes - kBehind, crc);
    if (std::memcmp(&crc, rows + kChecksumAt, kChecksumBytes) != 0) return r;
  }
  return n_rows;
}

}  // namespace pydist::cpu
