// lion_apply: weight decay and the voted update in one pass over the parameter.
//
// Reads and writes the parameter once and reads one bit (or the bits of the planes) an element.
// Where *skip is not zero, nothing happens: the step saw a non-finite value on some rank.
#include "signs_planes.cuh"

namespace pydist::cuda {
namespace {

template <typename P, PlaneKind kKind, int kWidth, bool kVector>
PYDIST_DEVICE void apply_chunk(P* x, int n, int lane, const unsigned char* planes, int64_t word,
                               const LionApplyArgs& a) {
  constexpr int kSteps = kWordBits / kWidth;
  constexpr int kBatch = kWidth == 8 ? 2 : 4;  // loads in flight
  const LaneVotes<kKind> votes =
      load_votes<kKind, kWidth>(planes, 4 * a.plane_words, a.planes, word, n, lane);
  const int ranks = static_cast<int>(a.ranks);
#pragma unroll 1
  for (int k0 = 0; k0 < kSteps; k0 += kBatch) {
    if (!kVector && k0 * kWidth * kWarpSize >= n) break;
    P v[kBatch][kWidth];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      load_run<P, kWidth, kVector>(x, kWidth * ((k0 + k) * kWarpSize + lane), n, v[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float update = a.step * votes.value(kWidth * k0, kWidth * k + j, ranks);
        narrow(lion_step(widen(v[k][j]), a.decay, update), &v[k][j]);
      }
      store_run<P, kWidth, kVector>(x, kWidth * ((k0 + k) * kWarpSize + lane), n, v[k]);
    }
  }
}

template <typename P, PlaneKind kKind>
__global__ void __launch_bounds__(kBlockThreads, 3)
    lion_apply_kernel(Rows rows, const unsigned char* planes, LionApplyArgs a,
                      const uint32_t* skip) {
  constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(P));
  if (skip && *skip) return;
  const int lane = lane_id();
  for_chunks<kElementTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kElementTile>(row, start);
    P* x = device_pointer<P>(row.x) + start * kWordBits;
    if (n == kElementChunk && aligned<16>(row.x)) {
      apply_chunk<P, kKind, kVectorWidth, true>(x, n, lane, planes + row.message, row.word + start,
                                                a);
    } else {
      apply_chunk<P, kKind, 1, false>(x, n, lane, planes + row.message, row.word + start, a);
    }
  });
}

template <typename P>
void launch_typed(const Rows& rows, const unsigned char* planes, const LionApplyArgs& args,
                  const uint32_t* skip, void* stream) {
  const auto run = [&](auto kernel) {
    launch_over<kElementTile>("lion_apply", kernel, rows, stream, planes, args, skip);
  };
  switch (plane_kind(args.planes, args.ranks)) {
    case PlaneKind::kSign:
      return run(lion_apply_kernel<P, PlaneKind::kSign>);
    case PlaneKind::kSignNonZero:
      return run(lion_apply_kernel<P, PlaneKind::kSignNonZero>);
    case PlaneKind::kCounts4:
      return run(lion_apply_kernel<P, PlaneKind::kCounts4>);
    case PlaneKind::kCounts8:
      return run(lion_apply_kernel<P, PlaneKind::kCounts8>);
    case PlaneKind::kCounts16:
      return run(lion_apply_kernel<P, PlaneKind::kCounts16>);
  }
}

}  // namespace

void lion_apply(const Rows& rows, DType dtype, const unsigned char* planes,
                const LionApplyArgs& args, const uint32_t* skip, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_typed<float>(rows, planes, args, skip, stream);
    case DType::kFloat16:
      return launch_typed<Half>(rows, planes, args, skip, stream);
    case DType::kBFloat16:
      return launch_typed<BFloat>(rows, planes, args, skip, stream);
  }
}

}  // namespace pydist::cuda
