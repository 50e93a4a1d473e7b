#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "float_mode.h"
#include "thread_pool.h"

namespace pydist::cpu {
namespace {

// ------------------------------------------------------------ which instruction set

std::vector<const Kernels*> supported_tables() {
  std::vector<const Kernels*> tables = {&kScalar};
#if defined(PYDIST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&kAvx512);
  }
#elif defined(PYDIST_AARCH64)
  tables.push_back(&kNeon);  // every AArch64 has it
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

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : supported_tables()) names.emplace_back(table->name);
  return names;
}

std::string current_isa() { return kernels().name; }

void select_isa(const std::string& name) { active.store(find_table(name)); }

void pack_signs(const Row* rows, int64_t n_rows, DType dtype, unsigned char* payload,
                uint32_t zero_bit, uint32_t* flags, int threads) {
  const auto kernel = kernels().pack_signs[static_cast<int>(dtype)];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    const void* x = reinterpret_cast<const void*>(row.x + from * width_of(dtype));
    raise_flags(flags, kernel(x, n, payload + 4 * (row.word + from / kWordBits), zero_bit));
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
    raise_flags(flags, kernel(part, payload + 4 * part.word, args));
  });
}

void lion_apply(const Row* rows, int64_t n_rows, DType dtype, const unsigned char* planes,
                const LionApplyArgs& args, int threads) {
  const auto kernel = kernels().lion_apply[static_cast<int>(dtype)];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    void* param = reinterpret_cast<void*>(row.x + from * width_of(dtype));
    kernel(param, n, planes + 4 * (row.word + from / kWordBits), args);
  });
}

void unpack_votes(const Row* rows, int64_t n_rows, DType dtype, const Unpack& args, int threads) {
  const auto kernel = kernels().unpack_votes[static_cast<int>(dtype)];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t from, int64_t n) {
    void* out = reinterpret_cast<void*>(row.x + from * width_of(dtype));
    kernel(out, n, args.planes + 4 * (row.word + from / kWordBits), args);
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
                     raise_flags(flags, kernel(part, args, scratch));
                   });
}

void quantize_feedback(const Row* rows, int64_t n_rows, DType dtype, DType residual,
                       const EncodeArgs& args, uint32_t* flags, int threads) {
  const auto kernel =
      kernels().quantize_feedback[static_cast<int>(dtype)][residual == DType::kFloat32 ? 0 : 1];
  for_block_pieces(rows, n_rows, args.format.block, threads,
                   [&](Row& part, int64_t from, float* scratch) {
                     part.x += from * width_of(dtype);
                     part.momentum += from * width_of(residual);
                     part.momentum_out += from * width_of(residual);
                     raise_flags(flags, kernel(part, args, scratch));
                   });
}

void reduce_quantized(const Row* rows, int64_t n_rows, const DecodeArgs& from, const EncodeArgs& to,
                      uint32_t* flags, int threads) {
  const auto kernel = kernels().reduce_quantized;
  for_block_pieces(rows, n_rows, from.format.block, threads,
                   [&](Row& part, int64_t, float* scratch) {
                     raise_flags(flags, kernel(part, from, to, scratch));
                   });
}

void dequantize(const Row* rows, int64_t n_rows, DType dtype, const DecodeArgs& args, int threads) {
  const auto kernel = kernels().dequantize[static_cast<int>(dtype)];
  for_block_pieces(rows, n_rows, args.format.block, threads,
                   [&](Row& part, int64_t from, float* scratch) {
                     part.x += from * width_of(dtype);
                     kernel(part, args, scratch);
                   });
}

void sum_values(const Row* rows, int64_t n_rows, DType from, DType to, const SumArgs& args,
                uint32_t* flags, int threads) {
  const auto kernel = kernels().sum_values[static_cast<int>(from)][static_cast<int>(to)];
  for_pieces(rows, n_rows, threads, [&](const Row& row, int64_t begin, int64_t n) {
    void* out = reinterpret_cast<void*>(row.x + begin * width_of(to));
    const int64_t at = (row.word * kWordBits + begin) * width_of(from);
    raise_flags(flags, kernel(out, n, args.values + at, args));
  });
}

void topk_select(const Row* rows, int64_t n_rows, DType dtype, const TopKEncode& args,
                 uint32_t* flags, int threads) {
  const auto kernel = kernels().topk_select[static_cast<int>(dtype)];
  const int block = args.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t from, float*) {
    part.x += from * width_of(dtype);
    raise_flags(flags, kernel(part, args, topk_room(block)));
  });
}

void topk_feedback(const Row* rows, int64_t n_rows, DType dtype, DType residual,
                   const TopKEncode& args, uint32_t* flags, int threads) {
  const auto kernel =
      kernels().topk_feedback[static_cast<int>(dtype)][residual == DType::kFloat32 ? 0 : 1];
  const int block = args.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t from, float*) {
    part.x += from * width_of(dtype);
    part.momentum += from * width_of(residual);
    part.momentum_out += from * width_of(residual);
    raise_flags(flags, kernel(part, args, topk_room(block)));
  });
}

void topk_reduce(const Row* rows, int64_t n_rows, const TopKDecode& from, const TopKEncode& to,
                 uint32_t* flags, int threads) {
  const auto kernel = kernels().topk_reduce;
  const int block = from.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t, float*) {
    raise_flags(flags, kernel(part, from, to, topk_room(block)));
  });
}

void topk_scatter(const Row* rows, int64_t n_rows, DType dtype, const TopKDecode& args,
                  uint32_t* flags, int threads) {
  const auto kernel = kernels().topk_scatter[static_cast<int>(dtype)];
  const int block = args.format.block;
  for_block_pieces(rows, n_rows, block, threads, [&](Row& part, int64_t from, float*) {
    part.x += from * width_of(dtype);
    raise_flags(flags, kernel(part, args, topk_room(block)));
  });
}

}  // namespace pydist::cpu
