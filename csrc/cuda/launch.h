// Launchers of the CUDA kernels: pointers, sizes, a stream; grid, launch, check. Plain C++ in the
// interface, so that the bindings need no CUDA header. Arguments live in wire/.
#pragma once

#if defined(PYDIST_CUDA)

#include <cstdint>
#include <string>

#include "../cpu/kernels.h"

namespace pydist::cuda {

// A table of rows in device memory, sorted by word, or one row carried in the launch itself. Each
// row's `words_before` is the number of words of all rows before it (for the one row: 0), and its
// address is a multiple of the element size.
struct Rows {
  const Row* table;  // device memory; null: use `only`
  int64_t count;     // rows; 0 with no table is an empty tensor
  int64_t words;     // payload words of all rows together (the work there is)
  Row only;
};

std::string build_description();  // CUDA version and the architectures compiled for
int device_count();               // 0 without a driver; never throws
std::string device_name(int device);

void pack_signs(const Rows& rows, DType dtype, unsigned char* payload, uint32_t zero_bit,
                uint32_t* flags, void* stream);
void lion_pack(const Rows& rows, DType grad, DType momentum, unsigned char* payload,
               const LionPackArgs& args, uint32_t* flags, void* stream);
void lion_apply(const Rows& rows, DType dtype, const unsigned char* planes,
                const LionApplyArgs& args, const uint32_t* skip, void* stream);
void unpack_votes(const Rows& rows, DType dtype, const Unpack& args, void* stream);
void count_votes(const Rows& rows, const VoteArgs& args, void* stream);
void majority_vote(const Rows& rows, const VoteArgs& args, void* stream);

// Block formats; `word`, `words_before` and `words` count blocks.
void quantize(const Rows& rows, DType dtype, const EncodeArgs& args, uint32_t* flags, void* stream);
void quantize_feedback(const Rows& rows, DType dtype, DType residual, const EncodeArgs& args,
                       uint32_t* flags, void* stream);
void reduce_quantized(const Rows& rows, const DecodeArgs& from, const EncodeArgs& to,
                      uint32_t* flags, void* stream);
void dequantize(const Rows& rows, DType dtype, const DecodeArgs& args, void* stream);

// Plain values; `word` counts 32 of them.
void sum_values(const Rows& rows, DType from, DType to, const SumArgs& args, uint32_t* flags,
                void* stream);

// Elias-coded blocks, counted likewise. What is written to args.result is known to the host when
// the stream has come so far; before decoding the host puts kNoFault there.
void elias_encode(const Rows& rows, const EliasArgs& args, void* stream);
void elias_decode(const Rows& rows, const EliasArgs& args, void* stream);
// Ternary; `word` counts units, of ternary_scale segments. `words_before` and `words` count what a
// warp takes: a segment (ternary_scale), else sixteen units.
void ternary_scale(const Rows& rows, DType dtype, const TernaryScaleArgs& args, uint32_t* flags,
                   void* stream);
void ternary_pack(const Rows& rows, DType dtype, const TernaryPackArgs& args, uint32_t* flags,
                  void* stream);
void ternary_sum(const Rows& rows, const TernarySource& from, unsigned char* out, uint32_t* flags,
                 void* stream);
void ternary_unpack(const Rows& rows, DType dtype, const TernarySource& from, uint32_t* flags,
                    void* stream);
void ternary_unpack_sums(const Rows& rows, DType dtype, const TernarySource& from, uint32_t* flags,
                         void* stream);
// Where sums of top-k blocks are made: `slots` blocks of floats in device memory.
struct TopKSlots {
  float* room;
  int64_t count;
};

// Top-k blocks; `word`, `words_before` and `words` count blocks.
void topk_select(const Rows& rows, DType dtype, const TopKEncode& args, uint32_t* flags,
                 void* stream);
void topk_feedback(const Rows& rows, DType dtype, DType residual, const TopKEncode& args,
                   uint32_t* flags, void* stream);
void topk_reduce(const Rows& rows, const TopKDecode& from, const TopKEncode& to, uint32_t* flags,
                 const TopKSlots& slots, void* stream);
void topk_scatter(const Rows& rows, DType dtype, const TopKDecode& args, uint32_t* flags,
                  const TopKSlots& slots, void* stream);

// What a call needs beside its codecs (message.cu). A usage word is 1 where a parameter has a
// gradient that is not all zeros, else 0; `word` of a row is the place of its usage word.
void find_used(const Rows& rows, int64_t itemsize, uint32_t* used, void* stream);
// Copies rows, without residuals where parameters are not used; parts of `count` rows, int64, stand
// behind them.
void keep_used(const Row* rows, int64_t count, const uint32_t* used, Row* out, void* stream);
// Writes the header (16 bytes in two words, little-endian) and `bytes` bytes of usage bits before
// `count` messages; merge_headers ors what all messages have, and compares the headers.
void put_headers(unsigned char* messages, int64_t count, int64_t stride, uint64_t low,
                 uint64_t high, const uint32_t* flags, const uint32_t* used, int64_t parts,
                 int64_t bytes, void* stream);
void merge_headers(const unsigned char* messages, int64_t count, int64_t stride, uint64_t low,
                   uint64_t high, uint32_t* flags, uint32_t* used, int64_t parts, void* stream);
// x[0, n) = nan where one of the words at `flags` says that something was not finite.
void fill_nan(uint64_t x, int64_t n, int64_t itemsize, uint64_t nan, const uint32_t* flags,
              int64_t words, void* stream);

}  // namespace pydist::cuda

#endif
