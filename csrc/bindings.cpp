// pydist._C, the table of contents. Raw addresses, sizes and a stream handle; no torch.
// Arguments are checked in Python (pydist/kernels/checks.py); the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/driver.h"
#include "cpu/float_mode.h"
#include "cuda/launch.h"

// Tests build the module a second time, with emulated CUDA, under another name. Its classes are
// module-local so that both can be imported, and take each other's.
#if !defined(PYDIST_MODULE)
#define PYDIST_MODULE _C
#endif

namespace py = pybind11;
using namespace pydist;

namespace {

template <typename T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

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

SumArgs sum_args(uint64_t values, int64_t stride, int64_t ranks, float divisor) {
  return {at<const unsigned char>(values), stride, ranks, divisor};
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

}  // namespace

PYBIND11_MODULE(PYDIST_MODULE, m) {
  m.doc() = "Kernels of pydist over raw addresses.";
  m.attr("WIRE_VERSION") = kWireVersion;
  m.attr("MAX_RANKS") = kMaxRanks;

  py::class_<LionPackArgs>(m, "LionPackArgs", py::module_local()).def(py::init(&lion_pack_args));
  py::class_<LionApplyArgs>(m, "LionApplyArgs", py::module_local()).def(py::init(&lion_apply_args));
  py::class_<VoteArgs>(m, "VoteArgs", py::module_local()).def(py::init(&vote_args));
  py::class_<Unpack>(m, "Unpack", py::module_local()).def(py::init(&unpack_args));

  py::class_<BlockFormat>(m, "BlockFormat", py::module_local()).def(py::init(&cpu::block_format));
  py::class_<EncodeArgs>(m, "EncodeArgs", py::module_local()).def(py::init(&encode_args));
  py::class_<DecodeArgs>(m, "DecodeArgs", py::module_local()).def(py::init(&decode_args));
  py::class_<SumArgs>(m, "SumArgs", py::module_local()).def(py::init(&sum_args));
  py::class_<EliasArgs>(m, "EliasArgs", py::module_local()).def(py::init(&elias_args));

  py::class_<TernaryScaleArgs>(m, "TernaryScaleArgs", py::module_local())
      .def(py::init(&ternary_scale_args));
  py::class_<TernaryPackArgs>(m, "TernaryPackArgs", py::module_local())
      .def(py::init(&ternary_pack_args));
  py::class_<TernarySource>(m, "TernarySource", py::module_local()).def(py::init(&ternary_source));
  py::class_<TopKFormat>(m, "TopKFormat", py::module_local()).def(py::init(&topk_format));
  py::class_<TopKEncode>(m, "TopKEncode", py::module_local()).def(py::init(&topk_encode));
  py::class_<TopKDecode>(m, "TopKDecode", py::module_local()).def(py::init(&topk_decode));

  m.def("supported_isas", &cpu::supported_isas);
  m.def("current_isa", &cpu::current_isa);
  m.def("select_isa", &cpu::select_isa);

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::module_ c = m.def_submodule("cpu");
  c.def(
      "pack_signs",
      [](uint64_t rows, int64_t n, int dtype, uint64_t payload, uint32_t zero_bit, uint64_t flags,
         int threads) {
        cpu::pack_signs(at<Row>(rows), n, DType(dtype), at<unsigned char>(payload), zero_bit,
                        at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "lion_pack",
      [](uint64_t rows, int64_t n, int grad, int momentum, uint64_t payload,
         const LionPackArgs& args, uint64_t flags, int threads) {
        cpu::lion_pack(at<Row>(rows), n, DType(grad), DType(momentum), at<unsigned char>(payload),
                       args, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "lion_apply",
      [](uint64_t rows, int64_t n, int dtype, uint64_t planes, const LionApplyArgs& args,
         uint64_t skip, int threads) {
        if (skip && *at<const uint32_t>(skip)) return;
        cpu::lion_apply(at<Row>(rows), n, DType(dtype), at<unsigned char>(planes), args, threads);
      },
      nogil);
  c.def(
      "unpack_votes",
      [](uint64_t rows, int64_t n, int dtype, const Unpack& args, int threads) {
        cpu::unpack_votes(at<Row>(rows), n, DType(dtype), args, threads);
      },
      nogil);
  c.def(
      "count_votes",
      [](uint64_t rows, int64_t n, const VoteArgs& args, int threads) {
        cpu::count_votes(at<Row>(rows), n, args, threads);
      },
      nogil);
  c.def(
      "majority_vote",
      [](uint64_t rows, int64_t n, const VoteArgs& args, int threads) {
        cpu::majority_vote(at<Row>(rows), n, args, threads);
      },
      nogil);
  c.def(
      "quantize",
      [](uint64_t rows, int64_t n, int dtype, const EncodeArgs& args, uint64_t flags, int threads) {
        cpu::quantize(at<Row>(rows), n, DType(dtype), args, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "quantize_feedback",
      [](uint64_t rows, int64_t n, int dtype, int residual, const EncodeArgs& args, uint64_t flags,
         int threads) {
        cpu::quantize_feedback(at<Row>(rows), n, DType(dtype), DType(residual), args,
                               at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "reduce_quantized",
      [](uint64_t rows, int64_t n, const DecodeArgs& from, const EncodeArgs& to, uint64_t flags,
         int threads) {
        cpu::reduce_quantized(at<Row>(rows), n, from, to, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "dequantize",
      [](uint64_t rows, int64_t n, int dtype, const DecodeArgs& args, int threads) {
        cpu::dequantize(at<Row>(rows), n, DType(dtype), args, threads);
      },
      nogil);
  c.def(
      "sum_values",
      [](uint64_t rows, int64_t n, int from, int to, const SumArgs& args, uint64_t flags,
         int threads) {
        cpu::sum_values(at<Row>(rows), n, DType(from), DType(to), args, at<uint32_t>(flags),
                        threads);
      },
      nogil);
  c.def(
      "elias_encode",
      [](uint64_t rows, int64_t n, const EliasArgs& args, int threads) {
        cpu::elias_encode(at<Row>(rows), n, args, threads);
      },
      nogil);
  c.def(
      "elias_decode",
      [](uint64_t rows, int64_t n, const EliasArgs& args, int threads) {
        cpu::elias_decode(at<Row>(rows), n, args, threads);
      },
      nogil);

  c.def(
      "ternary_scale",
      [](uint64_t rows, int64_t n, int dtype, const TernaryScaleArgs& args, uint64_t flags,
         int threads) {
        cpu::ternary_scale(at<Row>(rows), n, DType(dtype), args, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "ternary_pack",
      [](uint64_t rows, int64_t n, int dtype, const TernaryPackArgs& args, uint64_t flags,
         int threads) {
        cpu::ternary_pack(at<Row>(rows), n, DType(dtype), args, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "ternary_sum",
      [](uint64_t rows, int64_t n, const TernarySource& from, uint64_t out, uint64_t flags,
         int threads) {
        cpu::ternary_sum(at<Row>(rows), n, from, at<unsigned char>(out), at<uint32_t>(flags),
                         threads);
      },
      nogil);
  c.def(
      "ternary_unpack",
      [](uint64_t rows, int64_t n, int dtype, const TernarySource& from, uint64_t flags,
         int threads) {
        cpu::ternary_unpack(at<Row>(rows), n, DType(dtype), from, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "ternary_unpack_sums",
      [](uint64_t rows, int64_t n, int dtype, const TernarySource& from, uint64_t flags,
         int threads) {
        cpu::ternary_unpack_sums(at<Row>(rows), n, DType(dtype), from, at<uint32_t>(flags),
                                 threads);
      },
      nogil);

  c.def(
      "topk_select",
      [](uint64_t rows, int64_t n, int dtype, const TopKEncode& args, uint64_t flags, int threads) {
        cpu::topk_select(at<Row>(rows), n, DType(dtype), args, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "topk_feedback",
      [](uint64_t rows, int64_t n, int dtype, int residual, const TopKEncode& args, uint64_t flags,
         int threads) {
        cpu::topk_feedback(at<Row>(rows), n, DType(dtype), DType(residual), args,
                           at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "topk_reduce",
      [](uint64_t rows, int64_t n, const TopKDecode& from, const TopKEncode& to, uint64_t flags,
         int threads) {
        cpu::topk_reduce(at<Row>(rows), n, from, to, at<uint32_t>(flags), threads);
      },
      nogil);
  c.def(
      "topk_scatter",
      [](uint64_t rows, int64_t n, int dtype, const TopKDecode& args, uint64_t flags, int threads) {
        cpu::topk_scatter(at<Row>(rows), n, DType(dtype), args, at<uint32_t>(flags), threads);
      },
      nogil);

  c.def(
      "crc32c",
      [](uint64_t data, int64_t n, uint32_t before) {
        return cpu::crc32c(at<const unsigned char>(data), n, before);
      },
      nogil);
  c.def(
      "seal_messages",
      [](uint64_t rows, int64_t n, int64_t stride, int64_t bytes) {
        cpu::seal_messages(at<unsigned char>(rows), n, stride, bytes);
      },
      nogil);
  c.def(
      "first_damaged",
      [](uint64_t rows, int64_t n, int64_t stride, int64_t bytes, uint32_t digest) {
        return cpu::first_damaged(at<const unsigned char>(rows), n, stride, bytes, digest);
      },
      nogil);

#if defined(PYDIST_CUDA)
  // Rows are in device memory, or, where `rows` is 0, the one row given inline.
  m.attr("CUDA_BUILD") = cuda::build_description();
  py::module_ g = m.def_submodule("cuda");
  g.def("device_count", &cuda::device_count);
  g.def("device_name", &cuda::device_name);
  g.def(
      "pack_signs",
      [](const cuda::Rows& rows, int dtype, uint64_t payload, uint32_t zero_bit, uint64_t flags,
         uint64_t stream) {
        cuda::pack_signs(rows, DType(dtype), at<unsigned char>(payload), zero_bit,
                         at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "lion_pack",
      [](const cuda::Rows& rows, int grad, int momentum, uint64_t payload, const LionPackArgs& args,
         uint64_t flags, uint64_t stream) {
        cuda::lion_pack(rows, DType(grad), DType(momentum), at<unsigned char>(payload), args,
                        at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "lion_apply",
      [](const cuda::Rows& rows, int dtype, uint64_t planes, const LionApplyArgs& args,
         uint64_t skip, uint64_t stream) {
        cuda::lion_apply(rows, DType(dtype), at<unsigned char>(planes), args,
                         at<const uint32_t>(skip), at<void>(stream));
      },
      nogil);
  g.def(
      "unpack_votes",
      [](const cuda::Rows& rows, int dtype, const Unpack& args, uint64_t stream) {
        cuda::unpack_votes(rows, DType(dtype), args, at<void>(stream));
      },
      nogil);
  g.def(
      "count_votes",
      [](const cuda::Rows& rows, const VoteArgs& args, uint64_t stream) {
        cuda::count_votes(rows, args, at<void>(stream));
      },
      nogil);
  g.def(
      "majority_vote",
      [](const cuda::Rows& rows, const VoteArgs& args, uint64_t stream) {
        cuda::majority_vote(rows, args, at<void>(stream));
      },
      nogil);
  g.def(
      "quantize",
      [](const cuda::Rows& rows, int dtype, const EncodeArgs& args, uint64_t flags,
         uint64_t stream) {
        cuda::quantize(rows, DType(dtype), args, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "quantize_feedback",
      [](const cuda::Rows& rows, int dtype, int residual, const EncodeArgs& args, uint64_t flags,
         uint64_t stream) {
        cuda::quantize_feedback(rows, DType(dtype), DType(residual), args, at<uint32_t>(flags),
                                at<void>(stream));
      },
      nogil);
  g.def(
      "reduce_quantized",
      [](const cuda::Rows& rows, const DecodeArgs& from, const EncodeArgs& to, uint64_t flags,
         uint64_t stream) {
        cuda::reduce_quantized(rows, from, to, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "dequantize",
      [](const cuda::Rows& rows, int dtype, const DecodeArgs& args, uint64_t stream) {
        cuda::dequantize(rows, DType(dtype), args, at<void>(stream));
      },
      nogil);
  g.def(
      "sum_values",
      [](const cuda::Rows& rows, int from, int to, const SumArgs& args, uint64_t flags,
         uint64_t stream) {
        cuda::sum_values(rows, DType(from), DType(to), args, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "elias_encode",
      [](const cuda::Rows& rows, const EliasArgs& args, uint64_t stream) {
        cuda::elias_encode(rows, args, at<void>(stream));
      },
      nogil);
  g.def(
      "elias_decode",
      [](const cuda::Rows& rows, const EliasArgs& args, uint64_t stream) {
        cuda::elias_decode(rows, args, at<void>(stream));
      },
      nogil);
  g.def(
      "ternary_scale",
      [](const cuda::Rows& rows, int dtype, const TernaryScaleArgs& args, uint64_t flags,
         uint64_t stream) {
        cuda::ternary_scale(rows, DType(dtype), args, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "ternary_pack",
      [](const cuda::Rows& rows, int dtype, const TernaryPackArgs& args, uint64_t flags,
         uint64_t stream) {
        cuda::ternary_pack(rows, DType(dtype), args, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "ternary_sum",
      [](const cuda::Rows& rows, const TernarySource& from, uint64_t out, uint64_t flags,
         uint64_t stream) {
        cuda::ternary_sum(rows, from, at<unsigned char>(out), at<uint32_t>(flags),
                          at<void>(stream));
      },
      nogil);
  g.def(
      "ternary_unpack",
      [](const cuda::Rows& rows, int dtype, const TernarySource& from, uint64_t flags,
         uint64_t stream) {
        cuda::ternary_unpack(rows, DType(dtype), from, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "ternary_unpack_sums",
      [](const cuda::Rows& rows, int dtype, const TernarySource& from, uint64_t flags,
         uint64_t stream) {
        cuda::ternary_unpack_sums(rows, DType(dtype), from, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "topk_select",
      [](const cuda::Rows& rows, int dtype, const TopKEncode& args, uint64_t flags,
         uint64_t stream) {
        cuda::topk_select(rows, DType(dtype), args, at<uint32_t>(flags), at<void>(stream));
      },
      nogil);
  g.def(
      "topk_feedback",
      [](const cuda::Rows& rows, int dtype, int residual, const TopKEncode& args, uint64_t flags,
         uint64_t stream) {
        cuda::topk_feedback(rows, DType(dtype), DType(residual), args, at<uint32_t>(flags),
                            at<void>(stream));
      },
      nogil);
  g.def(
      "topk_reduce",
      [](const cuda::Rows& rows, const TopKDecode& from, const TopKEncode& to, uint64_t flags,
         uint64_t room, int64_t slots, uint64_t stream) {
        cuda::topk_reduce(rows, from, to, at<uint32_t>(flags), {at<float>(room), slots},
                          at<void>(stream));
      },
      nogil);
  g.def(
      "topk_scatter",
      [](const cuda::Rows& rows, int dtype, const TopKDecode& args, uint64_t flags, uint64_t room,
         int64_t slots, uint64_t stream) {
        cuda::topk_scatter(rows, DType(dtype), args, at<uint32_t>(flags), {at<float>(room), slots},
                           at<void>(stream));
      },
      nogil);
  py::class_<cuda::Rows>(g, "Rows", py::module_local())
      .def(py::init<uint64_t, int64_t, int64_t, std::vector<int64_t>>());
#else
  m.attr("CUDA_BUILD") = py::none();
#endif
}
