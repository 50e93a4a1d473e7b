// What each kernel source defines for its instruction set.
#pragma once

#include "kernels.h"

namespace pydist::cpu::PYDIST_ISA {

template <typename T>
uint32_t pack_signs(const void* x, int64_t n, unsigned char* words, uint32_t zero_bit);
template <typename G, typename M>
uint32_t lion_pack(const Row& row, unsigned char* words, const LionPackArgs& args);
template <typename P>
void lion_apply(void* param, int64_t n, const unsigned char* planes, const LionApplyArgs& args);
template <typename T>
void unpack_votes(void* out, int64_t n, const unsigned char* planes, const Unpack& args,
                  bool streams);
void count_votes(const VoteArgs& args, const Row& row);
void majority_vote(const VoteArgs& args, const Row& row);
template <typename T>
uint32_t quantize(const Row& row, const EncodeArgs& args, float* scratch);
template <typename T, typename R>
uint32_t quantize_feedback(const Row& row, const EncodeArgs& args, float* scratch);
uint32_t reduce_quantized(const Row& row, const DecodeArgs& from, const EncodeArgs& to,
                          float* scratch);
template <typename T>
void dequantize(const Row& row, const DecodeArgs& args, float* scratch, bool streams);
template <typename From, typename To>
uint32_t sum_values(void* out, int64_t n, const unsigned char* values, const SumArgs& args);
int64_t elias_encode(const Row& row, const EliasArgs& args, int64_t first, unsigned char* streams,
                     float* scratch);
int64_t elias_decode(const Row& row, const EliasArgs& args, int64_t first, float* scratch);
template <typename T>
void ternary_segments(const void* x, int64_t n, SegmentSum* sums);
uint32_t ternary_scale(const Row& row, const TernaryScaleArgs& args);
template <typename T>
uint32_t ternary_pack(const Row& row, const TernaryPackArgs& args);
uint32_t ternary_sum(const Row& row, const TernarySource& from, unsigned char* out);
template <typename T>
uint32_t ternary_unpack(const Row& row, const TernarySource& from, bool streams);
template <typename T>
uint32_t ternary_unpack_sums(const Row& row, const TernarySource& from, bool streams);
template <typename T>
uint32_t topk_select(const Row& row, const TopKEncode& args, const TopKRoom& room);
template <typename T, typename R>
uint32_t topk_feedback(const Row& row, const TopKEncode& args, const TopKRoom& room);
uint32_t topk_reduce(const Row& row, const TopKDecode& from, const TopKEncode& to,
                     const TopKRoom& room);
template <typename T>
uint32_t topk_scatter(const Row& row, const TopKDecode& args, const TopKRoom& room, bool streams);
uint32_t crc32c(const unsigned char* data, int64_t n, uint32_t before);

}  // namespace pydist::cpu::PYDIST_ISA
