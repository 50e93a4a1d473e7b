// pydist._C, the table of contents. Raw addresses, sizes and a stream handle; no torch.
// Arguments are checked in Python (pydist/kernels/checks.py); the GIL is released.
#include "bindings.h"

#include <pybind11/numpy.h>

#include "cpu/driver.h"
#include "cpu/float_mode.h"

// Tests build the module a second time, with emulated CUDA, under another name. Its classes are
// module-local so that both can be imported, and take each other's.
#if !defined(PYDIST_MODULE)
#define PYDIST_MODULE _C
#endif

namespace py = pybind11;
using namespace pydist;

namespace {

LionPackArgs lion_pack_args(double beta1, double one_minus_beta1, double beta2,
                            double one_minus_beta2, uint32_t zero_bit, double inv_range,
                            uint32_t seed, uint32_t key1, uint32_t step, uint64_t step_at) {
  const cpu::DefaultFloatMode mode;
  using cpu::round_scalar;
  return {round_scalar(beta1),
          round_scalar(one_minus_beta1),
          round_scalar(beta2),
          round_scalar(one_minus_beta2),
          zero_bit,
          round_scalar(inv_range),
          seed,
          key1,
          step,
          at<const int64_t>(step_at)};
}

LionApplyArgs lion_apply_args(double decay, double step, int planes, int64_t plane_words,
                              int64_t ranks) {
  const cpu::DefaultFloatMode mode;
  return {cpu::round_scalar(decay), cpu::round_scalar(step), planes, plane_words, ranks};
}

VoteArgs vote_args(uint64_t payloads, int64_t stride, int64_t ranks, uint64_t out,
                   int64_t plane_bytes, int ties, uint32_t seed, int64_t step, uint64_t step_at) {
  return {at<const unsigned char>(payloads), stride, ranks, at<unsigned char>(out),    plane_bytes,
          static_cast<Ties>(ties),           seed,   step,  at<const int64_t>(step_at)};
}

Unpack unpack_args(uint64_t planes, int64_t plane_bytes, int count, int64_t ranks, float divisor) {
  return {at<const unsigned char>(planes), plane_bytes, count, ranks, divisor};
}

EncodeArgs encode_args(const BlockFormat& format, uint64_t codes, uint64_t scales,
                       int64_t code_bytes, uint32_t zero_bit, uint32_t seed, uint32_t key1,
                       uint32_t step, uint64_t step_at) {
  return {format,
          at<unsigned char>(codes),
          at<unsigned char>(scales),
          code_bytes,
          zero_bit,
          seed,
          key1,
          step,
          at<const int64_t>(step_at)};
}

DecodeArgs decode_args(const BlockFormat& format, uint64_t codes, uint64_t scales, int64_t stride,
                       int64_t ranks, float divisor) {
  return {format, at<const unsigned char>(codes), at<const unsigned char>(scales), stride, ranks,
          divisor};
}

SumArgs sum_args(uint64_t values, int64_t stride, int64_t ranks, float divisor, uint64_t out) {
  return {at<const unsigned char>(values), stride, ranks, divisor, at<unsigned char>(out)};
}

EliasArgs elias_args(const BlockFormat& format, uint64_t codes, uint64_t fixed_scales,
                     int64_t code_bytes, uint64_t ends, uint64_t scales, uint64_t streams,
                     int64_t stream_bytes, uint64_t result) {
  return {format,
          at<unsigned char>(codes),
          at<unsigned char>(fixed_scales),
          code_bytes,
          at<unsigned char>(ends),
          at<unsigned char>(scales),
          at<unsigned char>(streams),
          stream_bytes,
          at<int64_t>(result)};
}

TernaryScaleArgs ternary_scale_args(double clip, uint64_t scratch) {
  const cpu::DefaultFloatMode mode;
  return {cpu::round_scalar(clip), at<SegmentSum>(scratch)};
}

TernaryPackArgs ternary_pack_args(uint64_t payload, int64_t bytes, uint32_t seed, uint32_t key1,
                                  uint32_t step, uint64_t step_at) {
  return {at<unsigned char>(payload), bytes, seed, key1, step, at<const int64_t>(step_at)};
}

TernarySource ternary_source(uint64_t data, int64_t bytes, int64_t stride, int64_t ranks,
                             float divisor) {
  return {at<const unsigned char>(data), bytes, stride, ranks, divisor};
}

TopKFormat topk_format(int block, int low_bits, int values, uint64_t density) {
  return {block, low_bits, DType(values), density};
}

TopKEncode topk_encode(const TopKFormat& format, uint64_t payload, int64_t bytes, uint32_t seed,
                       uint32_t step, uint64_t step_at) {
  return {format, at<unsigned char>(payload), bytes, seed, step, at<const int64_t>(step_at)};
}

TopKDecode topk_decode(const TopKFormat& format, uint64_t payload, int64_t stride, int64_t ranks,
                       float divisor, bool clear) {
  return {format, at<const unsigned char>(payload), stride, ranks, divisor, clear};
}

template <auto make, typename T>
void arguments(py::module_& m, const char* name) {
  py::class_<T>(m, name, py::module_local()).def(py::init(make));
}

void apply_unless_skipped(const CpuRows& rows, int dtype, uint64_t planes,
                          const LionApplyArgs& args, uint64_t skip, int threads) {
  if (skip && *at<const uint32_t>(skip)) return;
  cpu::lion_apply(rows.begin(), rows.count, DType(dtype), at<unsigned char>(planes), args, threads);
}

}  // namespace

PYBIND11_MODULE(PYDIST_MODULE, m) {
  m.doc() = "Kernels of pydist over raw addresses.";
  m.attr("WIRE_VERSION") = kWireVersion;
  m.attr("MAX_RANKS") = kMaxRanks;
  m.def("address_of", [](const py::array& x) { return reinterpret_cast<uintptr_t>(x.data()); });
  m.def("supported_isas", &cpu::supported_isas);
  m.def("current_isa", &cpu::current_isa);
  m.def("select_isa", &cpu::select_isa);
  m.def("stream_above", &cpu::stream_above);

  arguments<&lion_pack_args, LionPackArgs>(m, "LionPackArgs");
  arguments<&lion_apply_args, LionApplyArgs>(m, "LionApplyArgs");
  arguments<&vote_args, VoteArgs>(m, "VoteArgs");
  arguments<&unpack_args, Unpack>(m, "Unpack");
  arguments<&cpu::block_format, BlockFormat>(m, "BlockFormat");
  arguments<&encode_args, EncodeArgs>(m, "EncodeArgs");
  arguments<&decode_args, DecodeArgs>(m, "DecodeArgs");
  arguments<&sum_args, SumArgs>(m, "SumArgs");
  arguments<&elias_args, EliasArgs>(m, "EliasArgs");
  arguments<&ternary_scale_args, TernaryScaleArgs>(m, "TernaryScaleArgs");
  arguments<&ternary_pack_args, TernaryPackArgs>(m, "TernaryPackArgs");
  arguments<&ternary_source, TernarySource>(m, "TernarySource");
  arguments<&topk_format, TopKFormat>(m, "TopKFormat");
  arguments<&topk_encode, TopKEncode>(m, "TopKEncode");
  arguments<&topk_decode, TopKDecode>(m, "TopKDecode");

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::module_ c = m.def_submodule("cpu");
  c.def("pack_signs", on_cpu(&cpu::pack_signs), nogil);
  c.def("lion_pack", on_cpu(&cpu::lion_pack), nogil);
  c.def("lion_apply", &apply_unless_skipped, nogil);
  c.def("unpack_votes", on_cpu(&cpu::unpack_votes), nogil);
  c.def("count_votes", on_cpu(&cpu::count_votes), nogil);
  c.def("majority_vote", on_cpu(&cpu::majority_vote), nogil);
  c.def("quantize", on_cpu(&cpu::quantize), nogil);
  c.def("quantize_feedback", on_cpu(&cpu::quantize_feedback), nogil);
  c.def("reduce_quantized", on_cpu(&cpu::reduce_quantized), nogil);
  c.def("dequantize", on_cpu(&cpu::dequantize), nogil);
  c.def("sum_values", on_cpu(&cpu::sum_values), nogil);
  c.def("elias_encode", on_cpu(&cpu::elias_encode), nogil);
  c.def("elias_decode", on_cpu(&cpu::elias_decode), nogil);
  c.def("ternary_scale", on_cpu(&cpu::ternary_scale), nogil);
  c.def("ternary_pack", on_cpu(&cpu::ternary_pack), nogil);
  c.def("ternary_sum", on_cpu(&cpu::ternary_sum), nogil);
  c.def("ternary_unpack", on_cpu(&cpu::ternary_unpack), nogil);
  c.def("ternary_unpack_sums", on_cpu(&cpu::ternary_unpack_sums), nogil);
  c.def("topk_select", on_cpu(&cpu::topk_select), nogil);
  c.def("topk_feedback", on_cpu(&cpu::topk_feedback), nogil);
  c.def("topk_reduce", on_cpu(&cpu::topk_reduce), nogil);
  c.def("topk_scatter", on_cpu(&cpu::topk_scatter), nogil);
  c.def("crc32c", over_bytes(&cpu::crc32c), nogil);
  c.def("seal_messages", over_bytes(&cpu::seal_messages), nogil);
  c.def("first_damaged", over_bytes(&cpu::first_damaged), nogil);

#if defined(PYDIST_CUDA)
  m.attr("CUDA_BUILD") = cuda::build_description();
  py::module_ g = m.def_submodule("cuda");
  g.def("device_count", &cuda::device_count);
  g.def("device_name", &cuda::device_name);
  g.def("pack_signs", on_cuda(&cuda::pack_signs), nogil);
  g.def("lion_pack", on_cuda(&cuda::lion_pack), nogil);
  g.def("lion_apply", on_cuda(&cuda::lion_apply), nogil);
  g.def("unpack_votes", on_cuda(&cuda::unpack_votes), nogil);
  g.def("count_votes", on_cuda(&cuda::count_votes), nogil);
  g.def("majority_vote", on_cuda(&cuda::majority_vote), nogil);
  g.def("quantize", on_cuda(&cuda::quantize), nogil);
  g.def("quantize_feedback", on_cuda(&cuda::quantize_feedback), nogil);
  g.def("reduce_quantized", on_cuda(&cuda::reduce_quantized), nogil);
  g.def("dequantize", on_cuda(&cuda::dequantize), nogil);
  g.def("sum_values", on_cuda(&cuda::sum_values), nogil);
  g.def("elias_encode", on_cuda(&cuda::elias_encode), nogil);
  g.def("elias_decode", on_cuda(&cuda::elias_decode), nogil);
  g.def("ternary_scale", on_cuda(&cuda::ternary_scale), nogil);
  g.def("ternary_pack", on_cuda(&cuda::ternary_pack), nogil);
  g.def("ternary_sum", on_cuda(&cuda::ternary_sum), nogil);
  g.def("ternary_unpack", on_cuda(&cuda::ternary_unpack), nogil);
  g.def("ternary_unpack_sums", on_cuda(&cuda::ternary_unpack_sums), nogil);
  g.def("topk_select", on_cuda(&cuda::topk_select), nogil);
  g.def("topk_feedback", on_cuda(&cuda::topk_feedback), nogil);
  g.def("topk_reduce", on_cuda(&cuda::topk_reduce), nogil);
  g.def("topk_scatter", on_cuda(&cuda::topk_scatter), nogil);
  g.def("find_used", on_cuda(&cuda::find_used), nogil);
  g.def("keep_used", over_bytes(&cuda::keep_used), nogil);
  g.def("put_headers", over_bytes(&cuda::put_headers), nogil);
  g.def("merge_headers", over_bytes(&cuda::merge_headers), nogil);
  g.def("fill_nan", over_bytes(&cuda::fill_nan), nogil);
#else
  m.attr("CUDA_BUILD") = py::none();
#endif
}
