// quantize and quantize_feedback: codes and a scale per block; with feedback, of x + residual, and
// what was lost becomes the residual. Reads each value once from memory and writes `bits` bits.
#include "blocks_encode.cuh"

namespace pydist::cuda {
namespace {

// A source of runs as one of a tile.
template <typename Source>
struct Runs {
  Source x;

  PYDIST_DEVICE_MEMBER void tile(Tile& v) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      x.template run<true>(s * kWarpRun + kRun * lane_id(), v[s]);
    }
  }
  PYDIST_DEVICE_MEMBER void run(int i, Run& v) const { x.run(i, v); }
};

template <typename T, bool kStochastic>
__global__ void __launch_bounds__(kBlockThreads, 3)
    quantize_kernel(Rows rows, EncodeArgs a, uint32_t* flags) {
  const Tiling tiling(a.format.block);
  encode_rows<kStochastic, true>(
      rows, a, tiling, true, flags, [](const Row& row, const Group& group) {
        return Encoding<Runs<Plain<T>>, Nothing>{{plain<T>(row.x, group.begin, group.n)}, {}};
      });
}

// What values are less what was sent becomes their residual, where R holds it. A block that is not
// finite sends nothing, and its residuals stay.
template <typename R>
struct Rest {
  Plain<R> old;
  R* residual;
  const Decoder& decoder;
  bool vector;

  template <bool kWhole, typename Scale>
  PYDIST_DEVICE_MEMBER void step(int begin, const Run& p, Codes codes, const Scale& scale,
                                 bool finite) const {
    if (!old.x) return;
    const int i = begin + kRun * lane_id();
    Run rest;
    bool fits = true;
#pragma unroll
    for (int j = 0; j < kRun; ++j) rest[j] = -0.0f;
    decoder.add(codes, scale(), rest);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      rest[j] = p[j] - rest[j];
      fits = fits && holds(rest[j]);
    }
    if (!fits) keep_old(i, rest);
    if (kWhole && __all_sync(kAllLanes, finite)) {
      __syncwarp();  // in place, a lane may write what another has read
      store_step(residual + begin, rest);
    } else if (finite) {
      store_values(residual, i, old.n, vector, rest);
    } else if (residual != old.x) {
      copy(i);
    }
  }

  static PYDIST_DEVICE_MEMBER bool holds(float x) {
    return (float_bits(x) & kAbsMask) < FiniteLimit<R>::value;
  }
  PYDIST_DEVICE_MEMBER void keep_old(int i, Run& rest) const {
    Run kept;
    old.run(i, kept);
#pragma unroll
    for (int j = 0; j < kRun; ++j) rest[j] = holds(rest[j]) ? rest[j] : kept[j];
  }
  PYDIST_DEVICE_MEMBER void copy(int i) const {
#pragma unroll 1
    for (int j = i; j < i + kRun && j < old.n; ++j) residual[j] = old.x[j];
  }
};

template <typename T, typename R, bool kStochastic>
__global__ void __launch_bounds__(kBlockThreads, 2)
    quantize_feedback_kernel(Rows rows, EncodeArgs a, uint32_t* flags) {
  const Tiling tiling(a.format.block);
  const Decoder decoder(a.format, tiling.lanes());
  encode_rows<kStochastic, false>(
      rows, a, tiling, true, flags, [&](const Row& row, const Group& group) {
        const Plain<R> old = residual_of<R>(row, group.begin, group.n);
        R* residual = device_pointer<R>(row.momentum_out) + group.begin;
        using Source = Runs<Compensated<T, R>>;
        return Encoding<Source, Rest<R>>{{{plain<T>(row.x, group.begin, group.n), old}},
                                         {old, residual, decoder, aligned<16>(row.momentum_out)}};
      });
}

template <typename T>
void launch_plain(const Rows& rows, const EncodeArgs& a, uint32_t* flags, void* stream) {
  launch_groups("quantize", a.format.block,
                a.format.stochastic ? quantize_kernel<T, true> : quantize_kernel<T, false>, rows,
                stream, a, flags);
}

template <typename T, typename R>
void launch_feedback(const Rows& rows, const EncodeArgs& a, uint32_t* flags, void* stream) {
  launch_groups("quantize_feedback", a.format.block,
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
