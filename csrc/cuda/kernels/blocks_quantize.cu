// quantize and quantize_feedback: codes and a scale per block; with feedback, of x + residual, and
// what was lost becomes the residual. Reads each value once from memory and writes `bits` bits.
#include "blocks.cuh"

namespace pydist::cuda {
namespace {

template <typename T, bool kStochastic>
__global__ void __launch_bounds__(kBlockThreads, 2)
    quantize_kernel(Rows rows, EncodeArgs a, uint32_t* flags) {
  const int lane = lane_id();
  bool finite = true;
  for_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const auto nothing = [](int, const Run&, uint64_t, const Encoder&) {};
    const bool good = encode_block<kStochastic>(plain<T>(row.x, begin, n), index, n, a,
                                                draw_key(a, row), row.first + begin, lane, nothing);
    finite = finite && good;
  });
  raise_flags(flags, !finite);
}

// residual[i, i + kRun) = p - what the codes decode to, where R holds it.
template <typename R>
PYDIST_DEVICE void keep_rest(const Plain<R>& old, R* residual, bool vector, int i, const Run& p,
                             uint64_t codes, const Encoder& e) {
  const int n = old.n;
  const uint32_t mask = (1u << e.f.bits) - 1u;
  Run kept;
  old.run(i, kept);
  R next[kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const float sent =
        value_of(e.f, static_cast<uint32_t>(codes >> (j * e.f.bits)) & mask, e.scale);
    const float rest = p[j] - sent;
    const bool fits = (float_bits(rest) & kAbsMask) < FiniteLimit<R>::value;
    narrow(fits ? rest : kept[j], &next[j]);
  }
  if (vector && i + kRun <= n) {
    store_run<R, kRun, true>(residual, i, n, next);
  } else {
    store_run<R, kRun, false>(residual, i, n, next);
  }
}

template <typename T, typename R, bool kStochastic>
__global__ void __launch_bounds__(kBlockThreads, 2)
    quantize_feedback_kernel(Rows rows, EncodeArgs a, uint32_t* flags) {
  const int lane = lane_id();
  bool finite = true;
  for_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const Plain<R> old = plain<R>(row.momentum, begin, n);
    R* residual = device_pointer<R>(row.momentum_out) + begin;
    const bool vector = aligned<16>(row.momentum_out);
    const Compensated<T, R> p = {plain<T>(row.x, begin, n), old};
    const bool good =
        encode_block<kStochastic>(p, index, n, a, draw_key(a, row), row.first + begin, lane,
                                  [&](int i, const Run& v, uint64_t codes, const Encoder& e) {
                                    keep_rest(old, residual, vector, i, v, codes, e);
                                  });
    if (!good && row.momentum_out != row.momentum) {  // nothing of the block is sent
      for (int i = lane; i < n; i += kWarpSize) residual[i] = old.x[i];
    }
    finite = finite && good;
  });
  raise_flags(flags, !finite);
}

template <typename T>
void launch_plain(const Rows& rows, const EncodeArgs& a, uint32_t* flags, void* stream) {
  launch_blocks("quantize",
                a.format.stochastic ? quantize_kernel<T, true> : quantize_kernel<T, false>, rows,
                stream, a, flags);
}

template <typename T, typename R>
void launch_feedback(const Rows& rows, const EncodeArgs& a, uint32_t* flags, void* stream) {
  launch_blocks("quantize_feedback",
                a.format.stochastic ? quantize_feedback_kernel<T, R, true>
                                    : quantize_feedback_kernel<T, R, false>,
                rows, stream, a, flags);
}

template <typename T>
void launch_residual(const Rows& rows, DType residual, const EncodeArgs& a, uint32_t* flags,
                     void* stream) {
  if (residual == DType::kFloat32) return launch_feedback<T, float>(rows, a, flags, stream);
  launch_feedback<T, BFloat>(rows, a, flags, stream);
}

}  // namespace

void quantize(const Rows& rows, DType dtype, const EncodeArgs& args, uint32_t* flags,
              void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_plain<float>(rows, args, flags, stream);
    case DType::kFloat16:
      return launch_plain<Half>(rows, args, flags, stream);
    case DType::kBFloat16:
      return launch_plain<BFloat>(rows, args, flags, stream);
  }
}

void quantize_feedback(const Rows& rows, DType dtype, DType residual, const EncodeArgs& args,
                       uint32_t* flags, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_residual<float>(rows, residual, args, flags, stream);
    case DType::kFloat16:
      return launch_residual<Half>(rows, residual, args, flags, stream);
    case DType::kBFloat16:
      return launch_residual<BFloat>(rows, residual, args, flags, stream);
  }
}

}  // namespace pydist::cuda
