// The table of CPU kernels. Each instruction set compiles the same sources into one such table.
//
// A kernel here works on one piece: elements that are contiguous in memory and start on a payload
// word. Splitting rows into pieces and pieces over threads is the driver's work (driver.h).
#pragma once

#include "../wire/elias.h"
#include "../wire/lion.h"
#include "../wire/raw.h"
#include "../wire/ternary.h"
#include "../wire/topk.h"
#include "../wire/votes.h"

namespace pydist::cpu {

// Scratch of a thread for blocks of top-k.
struct TopKRoom {
  float *dense, *other;         // a block each
  uint32_t* positions;          // a block and a vector
  uint32_t *magnitudes, *work;  // a block each
};

struct Kernels {
  const char* name;
  // Signs of x[0, n) into words. Returns flags. Indexed by DType.
  uint32_t (*pack_signs[3])(const void* x, int64_t n, unsigned char* words, uint32_t zero_bit);
  // Direction, sign and momentum in one pass. Indexed by gradient DType, then momentum
  // (0: float32, 1: bfloat16).
  uint32_t (*lion_pack[3][2])(const Row& row, unsigned char* words, const LionPackArgs& args);
  // Decay and update in one pass. Indexed by parameter DType.
  void (*lion_apply[3])(void* param, int64_t n, const unsigned char* planes,
                        const LionApplyArgs& args);
  // Values of a vote into out[0, n). Indexed by DType. `streams`, here and below: stores go past
  // the caches where the kernel can.
  void (*unpack_votes[3])(void* out, int64_t n, const unsigned char* planes, const Unpack& args,
                          bool streams);
  // Both read words [word, word + words_for(n)) of every rank.
  void (*count_votes)(const VoteArgs& args, const Row& row);
  void (*majority_vote)(const VoteArgs& args, const Row& row);

  // Block formats: a piece starts on a block, and its `word` counts blocks. `scratch` has room for
  // the floats of two blocks. Encoders return flags.
  uint32_t (*quantize[3])(const Row& row, const EncodeArgs& args, float* scratch);
  // Encodes x + residual (`momentum`) and keeps the rest in `momentum_out`; indexed as lion_pack.
  uint32_t (*quantize_feedback[3][2])(const Row& row, const EncodeArgs& args, float* scratch);
  uint32_t (*reduce_quantized)(const Row& row, const DecodeArgs& from, const EncodeArgs& to,
                               float* scratch);
  void (*dequantize[3])(const Row& row, const DecodeArgs& args, float* scratch, bool streams);

  // Sums of plain values into out[0, n). Returns flags. Indexed by DType of values, then of `out`.
  uint32_t (*sum_values[3][3])(void* out, int64_t n, const unsigned char* values,
                               const SumArgs& args);
  // Elias-coded blocks; `first` is the piece's first block in the table. The encoder writes streams
  // one behind the other, their ends counted from `streams`, and returns their bytes; the decoder
  // returns the first fault, or kNoFault.
  int64_t (*elias_encode)(const Row& row, const EliasArgs& args, int64_t first,
                          unsigned char* streams, float* scratch);
  int64_t (*elias_decode)(const Row& row, const EliasArgs& args, int64_t first, float* scratch);

  // Ternary: `word` counts units, and a piece starts on one; scalers are behind `momentum` and
  // `momentum_out`. All but the first return flags.
  void (*ternary_segments[3])(const void* x, int64_t n, SegmentSum* sums);
  uint32_t (*ternary_scale)(const Row& row, const TernaryScaleArgs& args);
  uint32_t (*ternary_pack[3])(const Row& row, const TernaryPackArgs& args);
  uint32_t (*ternary_sum)(const Row& row, const TernarySource& from, unsigned char* out);
  uint32_t (*ternary_unpack[3])(const Row& row, const TernarySource& from, bool streams);
  uint32_t (*ternary_unpack_sums[3])(const Row& row, const TernarySource& from, bool streams);

  // Top-k blocks: pieces as above. All return flags.
  uint32_t (*topk_select[3])(const Row& row, const TopKEncode& args, const TopKRoom& room);
  uint32_t (*topk_feedback[3][2])(const Row& row, const TopKEncode& args, const TopKRoom& room);
  uint32_t (*topk_reduce)(const Row& row, const TopKDecode& from, const TopKEncode& to,
                          const TopKRoom& room);
  uint32_t (*topk_scatter[3])(const Row& row, const TopKDecode& args, const TopKRoom& room,
                              bool streams);

  // Checksum of data[0, n) behind bytes whose checksum is `before` (0: none).
  uint32_t (*crc32c)(const unsigned char* data, int64_t n, uint32_t before);
};

extern const Kernels kScalar;
#if defined(PYDIST_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#elif defined(PYDIST_AARCH64)
extern const Kernels kNeon;
#endif

}  // namespace pydist::cpu
