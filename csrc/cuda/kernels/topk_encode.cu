// topk_select and topk_feedback: the k largest entries of a block, and with feedback, of
// x + residual, whose rest becomes the residual.
//
// The k-th largest magnitude is found digit by digit, by counting (a radix selection): a block is
// read four times, once from memory and then out of the cache.
#include "topk.cuh"

namespace pydist::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    topk_select_kernel(Rows rows, TopKEncode a, uint32_t* flags) {
  __shared__ TopKShared s;
  for_topk_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const bool finite =
        select_block(plain<T>(row.x, begin, n), a, row, index, begin, n, &s, TopKKeepNothing{});
    raise_topk(flags, finite ? 0u : kFlagNonFinite);
  });
}

// residual[i, i + kRun) = p, less what was sent, where R holds it.
template <typename R>
PYDIST_DEVICE void keep_unsent(DType values, const Plain<R>& old, R* residual, bool vector, int i,
                               const Run& p, uint32_t taken) {
  Run kept;
  old.run(i, kept);
  R next[kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const float rest = taken >> j & 1u ? p[j] - travelled(values, p[j]) : p[j];
    const bool fits = (float_bits(rest) & kAbsMask) < FiniteLimit<R>::value;
    narrow(fits ? rest : kept[j], &next[j]);
  }
  if (vector && i + kRun <= old.n) {
    store_run<R, kRun, true>(residual, i, old.n, next);
  } else {
    store_run<R, kRun, false>(residual, i, old.n, next);
  }
}

template <typename T, typename R>
__global__ void __launch_bounds__(kBlockThreads, 2)
    topk_feedback_kernel(Rows rows, TopKEncode a, uint32_t* flags) {
  __shared__ TopKShared s;
  for_topk_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const Plain<R> old = plain<R>(row.momentum, begin, n);
    R* residual = device_pointer<R>(row.momentum_out) + begin;
    const bool vector = aligned<16>(row.momentum_out);
    const Compensated<T, R> p = {plain<T>(row.x, begin, n), old};
    const bool finite =
        select_block(p, a, row, index, begin, n, &s, [&](int i, const Run& v, uint32_t taken) {
          keep_unsent(a.format.values, old, residual, vector, i, v, taken);
        });
    if (!finite && row.momentum_out != row.momentum) {  // nothing of the block is sent
      for (int i = thread_id(); i < n; i += kBlockThreads) residual[i] = old.x[i];
    }
    raise_topk(flags, finite ? 0u : kFlagNonFinite);
  });
}

template <typename T>
void launch_select(const Rows& rows, const TopKEncode& a, uint32_t* flags, void* stream) {
  launch_topk("topk_select", topk_select_kernel<T>, rows, rows.words, stream, a, flags);
}

template <typename T>
void launch_feedback(const Rows& rows, DType residual, const TopKEncode& a, uint32_t* flags,
                     void* stream) {
  auto kernel = residual == DType::kFloat32 ? topk_feedback_kernel<T, float>
                                            : topk_feedback_kernel<T, BFloat>;
  launch_topk("topk_feedback", kernel, rows, rows.words, stream, a, flags);
}

}  // namespace

void topk_select(const Rows& rows, DType dtype, const TopKEncode& args, uint32_t* flags,
                 void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_select<float>(rows, args, flags, stream);
    case DType::kFloat16:
      return launch_select<Half>(rows, args, flags, stream);
    case DType::kBFloat16:
      return launch_select<BFloat>(rows, args, flags, stream);
  }
}

void topk_feedback(const Rows& rows, DType dtype, DType residual, const TopKEncode& args,
                   uint32_t* flags, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_feedback<float>(rows, residual, args, flags, stream);
    case DType::kFloat16:
      return launch_feedback<Half>(rows, residual, args, flags, stream);
    case DType::kBFloat16:
      return launch_feedback<BFloat>(rows, residual, args, flags, stream);
  }
}

}  // namespace pydist::cuda
