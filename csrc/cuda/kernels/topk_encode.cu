// topk_select and topk_feedback: the k largest entries of a block, and with feedback, of
// x + residual, whose rest becomes the residual.
//
// A block is read once, and with feedback a second time: whether it is finite has to be known
// before the first residual is written.
#include "topk_entries.cuh"

namespace pydist::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    topk_select_kernel(Rows rows, TopKEncode a, uint32_t* flags) {
  __shared__ TopKShared s;
  for_topk_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const bool finite = select_block(plain<T>(row.x, begin, n), in_message(a, row), row, index,
                                     begin, n, &s, TopKKeepNothing{});
    raise_topk(flags, finite ? 0u : kFlagNonFinite);
  });
}

// residual[i, i + kRun) = p, less what was sent, where R holds it.
template <bool kVector, typename T, typename R>
PYDIST_DEVICE void keep_unsent(DType values, const Compensated<T, R>& source, R* residual, int i,
                               uint32_t taken) {
  const int n = source.x.n;
  T x[kRun];
  R kept[kRun];
  load_run<T, kRun, kVector>(source.x.x, i, n, x);
  load_run<R, kRun, kVector>(source.residual.x, i, n, kept);
  Run rest;
#pragma unroll
  for (int j = 0; j < kRun; ++j) rest[j] = widen(x[j]) + widen(kept[j]);
  if (taken) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (taken >> j & 1u) rest[j] = rest[j] - travelled(values, rest[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const bool fits = (float_bits(rest[j]) & kAbsMask) < FiniteLimit<R>::value;
    narrow(fits ? rest[j] : widen(kept[j]), &kept[j]);
  }
  store_run<R, kRun, kVector>(residual, i, n, kept);
}

template <typename T, typename R>
__global__ void __launch_bounds__(kBlockThreads, 3)
    topk_feedback_kernel(Rows rows, TopKEncode a, uint32_t* flags) {
  __shared__ TopKShared s;
  for_topk_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const Plain<R> old = residual_of<R>(row, begin, n);
    R* residual = device_pointer<R>(row.momentum_out) + begin;
    const Compensated<T, R> p = {plain<T>(row.x, begin, n), old};
    const bool vector = p.x.vector && old.vector && aligned<16>(row.momentum_out);
    const TopKEncode here = in_message(a, row);
    const bool finite = select_block(p, here, row, index, begin, n, &s, [&](int i, uint32_t taken) {
      if (!old.x) return;
      if (vector && i + kRun <= n) {
        keep_unsent<true>(a.format.values, p, residual, i, taken);
      } else {
        keep_unsent<false>(a.format.values, p, residual, i, taken);
      }
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
