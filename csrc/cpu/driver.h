// From rows to kernels: splits rows into pieces, pieces over threads, and guards the float mode.
// Raw addresses in, nothing allocated for the caller, no Python.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pydist::cpu {

// Instruction sets compiled in and supported by this processor, slowest first.
std::vector<std::string> supported_isas();
// The one in use. PYDIST_ISA in the environment forces it; an unknown or unsupported one throws.
std::string current_isa();
void select_isa(const std::string& name);
// What writes more bytes than these goes past the caches from now on; returns what was so far.
int64_t stream_above(int64_t bytes);

void pack_signs(const Row* rows, int64_t n_rows, DType dtype, unsigned char* payload,
                uint32_t zero_bit, uint32_t* flags, int threads);
void lion_pack(const Row* rows, int64_t n_rows, DType grad, DType momentum, unsigned char* payload,
               const LionPackArgs& args, uint32_t* flags, int threads);
void lion_apply(const Row* rows, int64_t n_rows, DType dtype, const unsigned char* planes,
                const LionApplyArgs& args, int threads);
void unpack_votes(const Row* rows, int64_t n_rows, DType dtype, const Unpack& args, int threads);
void count_votes(const Row* rows, int64_t n_rows, const VoteArgs& args, int threads);
void majority_vote(const Row* rows, int64_t n_rows, const VoteArgs& args, int threads);

// Block formats; `word` of a row counts blocks.
BlockFormat block_format(int scheme, int bits, int block, int norm, bool stochastic);
void quantize(const Row* rows, int64_t n_rows, DType dtype, const EncodeArgs& args, uint32_t* flags,
              int threads);
void quantize_feedback(const Row* rows, int64_t n_rows, DType dtype, DType residual,
                       const EncodeArgs& args, uint32_t* flags, int threads);
void reduce_quantized(const Row* rows, int64_t n_rows, const DecodeArgs& from, const EncodeArgs& to,
                      uint32_t* flags, int threads);
void dequantize(const Row* rows, int64_t n_rows, DType dtype, const DecodeArgs& args, int threads);

// Plain values; `word` of a row counts 32 of them.
void sum_values(const Row* rows, int64_t n_rows, DType from, DType to, const SumArgs& args,
                uint32_t* flags, int threads);

// Elias-coded blocks; `words_before` of a row counts blocks too. Encoding needs the room of the
// longest streams there can be, and writes the end of them to *args.result.
void elias_encode(const Row* rows, int64_t n_rows, const EliasArgs& args, int threads);
void elias_decode(const Row* rows, int64_t n_rows, const EliasArgs& args, int threads);
// Ternary (wire/ternary.h); `word` of a row counts units, of ternary_scale segments.
void ternary_scale(const Row* rows, int64_t n_rows, DType dtype, const TernaryScaleArgs& args,
                   uint32_t* flags, int threads);
void ternary_pack(const Row* rows, int64_t n_rows, DType dtype, const TernaryPackArgs& args,
                  uint32_t* flags, int threads);
void ternary_sum(const Row* rows, int64_t n_rows, const TernarySource& from, unsigned char* out,
                 uint32_t* flags, int threads);
void ternary_unpack(const Row* rows, int64_t n_rows, DType dtype, const TernarySource& from,
                    uint32_t* flags, int threads);
void ternary_unpack_sums(const Row* rows, int64_t n_rows, DType dtype, const TernarySource& from,
                         uint32_t* flags, int threads);
// Top-k blocks; `word` of a row counts blocks.
void topk_select(const Row* rows, int64_t n_rows, DType dtype, const TopKEncode& args,
                 uint32_t* flags, int threads);
void topk_feedback(const Row* rows, int64_t n_rows, DType dtype, DType residual,
                   const TopKEncode& args, uint32_t* flags, int threads);
void topk_reduce(const Row* rows, int64_t n_rows, const TopKDecode& from, const TopKEncode& to,
                 uint32_t* flags, int threads);
void topk_scatter(const Row* rows, int64_t n_rows, DType dtype, const TopKDecode& args,
                  uint32_t* flags, int threads);

// Messages on the wire (wire/message.h): a row each, of `bytes` bytes. The digest of the call
// stands in the place of the checksum before; row by row it is replaced.
void seal_messages(unsigned char* rows, int64_t n_rows, int64_t stride, int64_t bytes);
// The first row whose checksum is wrong for a call of this digest; n_rows where none is.
int64_t first_damaged(const unsigned char* rows, int64_t n_rows, int64_t stride, int64_t bytes,
                      uint32_t digest);
uint32_t crc32c(const unsigned char* data, int64_t n, uint32_t before);

}  // namespace pydist::cpu
