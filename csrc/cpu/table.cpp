// The kernels of one instruction set, as a table. PYDIST_ISA and PYDIST_TABLE come from CMake.
#include "table.h"

#define PYDIST_STRING_(x) #x
#define PYDIST_STRING(x) PYDIST_STRING_(x)

namespace pydist::cpu {

namespace isa = PYDIST_ISA;

extern const Kernels PYDIST_TABLE = {
    PYDIST_STRING(PYDIST_ISA),
    {isa::pack_signs<float>, isa::pack_signs<Half>, isa::pack_signs<BFloat>},
    {{isa::lion_pack<float, float>, isa::lion_pack<float, BFloat>},
     {isa::lion_pack<Half, float>, isa::lion_pack<Half, BFloat>},
     {isa::lion_pack<BFloat, float>, isa::lion_pack<BFloat, BFloat>}},
    {isa::lion_apply<float>, isa::lion_apply<Half>, isa::lion_apply<BFloat>},
    {isa::unpack_votes<float>, isa::unpack_votes<Half>, isa::unpack_votes<BFloat>},
    isa::count_votes,
    isa::majority_vote,
    {isa::quantize<float>, isa::quantize<Half>, isa::quantize<BFloat>},
    {{isa::quantize_feedback<float, float>, isa::quantize_feedback<float, BFloat>},
     {isa::quantize_feedback<Half, float>, isa::quantize_feedback<Half, BFloat>},
     {isa::quantize_feedback<BFloat, float>, isa::quantize_feedback<BFloat, BFloat>}},
    isa::reduce_quantized,
    {isa::dequantize<float>, isa::dequantize<Half>, isa::dequantize<BFloat>},
    {{isa::sum_values<float, float>, isa::sum_values<float, Half>, isa::sum_values<float, BFloat>},
     {isa::sum_values<Half, float>, isa::sum_values<Half, Half>, isa::sum_values<Half, BFloat>},
     {isa::sum_values<BFloat, float>, isa::sum_values<BFloat, Half>,
      isa::sum_values<BFloat, BFloat>}},
    isa::elias_encode,
    isa::elias_decode,
    {isa::ternary_segments<float>, isa::ternary_segments<Half>, isa::ternary_segments<BFloat>},
    isa::ternary_scale,
    {isa::ternary_pack<float>, isa::ternary_pack<Half>, isa::ternary_pack<BFloat>},
    isa::ternary_sum,
    {isa::ternary_unpack<float>, isa::ternary_unpack<Half>, isa::ternary_unpack<BFloat>},
    {isa::ternary_unpack_sums<float>, isa::ternary_unpack_sums<Half>,
     isa::ternary_unpack_sums<BFloat>},
    {isa::topk_select<float>, isa::topk_select<Half>, isa::topk_select<BFloat>},
    {{isa::topk_feedback<float, float>, isa::topk_feedback<float, BFloat>},
     {isa::topk_feedback<Half, float>, isa::topk_feedback<Half, BFloat>},
     {isa::topk_feedback<BFloat, float>, isa::topk_feedback<BFloat, BFloat>}},
    isa::topk_reduce,
    {isa::topk_scatter<float>, isa::topk_scatter<Half>, isa::topk_scatter<BFloat>},
    isa::crc32c,
};

}  // namespace pydist::cpu
