// unpack_votes: the values of a vote, from sign planes (±1, 0) or count planes (sum or mean).
//
// Reads the bits of the planes, writes every element once; values are divided by `divisor` with
// IEEE rounding (sign planes know two or three values, which are divided once).
#include "signs_planes.cuh"

namespace pydist::cuda {
namespace {

// The three values of a majority after the division.
struct Levels {
  float plus, minus, zero;
};

template <PlaneKind kKind>
PYDIST_DEVICE float divided(const LaneVotes<kKind>& votes, int bit, const Levels& levels,
                            const Unpack& a) {
  if constexpr (kKind == PlaneKind::kSign || kKind == PlaneKind::kSignNonZero) {
    const float sign = (votes.planes[0] >> bit) & 1u ? levels.plus : levels.minus;
    if constexpr (kKind == PlaneKind::kSign)
      return sign;
    else
      return (votes.planes[1] >> bit) & 1u ? sign : levels.zero;
  } else {
    return votes.value(bit, static_cast<float>(a.ranks)) / a.divisor;
  }
}

template <typename T, PlaneKind kKind, int kWidth, bool kVector>
PYDIST_DEVICE void unpack_chunk(T* out, int n, int lane, int64_t word, const Levels& levels,
                                const Unpack& a) {
  constexpr int kSteps = kWordBits / kWidth;
  const LaneVotes<kKind> votes =
      load_votes<kKind, kWidth>(a.planes, a.plane_bytes, a.count, word, n, lane);
#pragma unroll 2
  for (int k = 0; k < kSteps; ++k) {
    if (!kVector && k * kWidth * kWarpSize >= n) break;
    T v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) narrow(divided(votes, kWidth * k + j, levels, a), &v[j]);
    store_run<T, kWidth, kVector>(out, kWidth * (k * kWarpSize + lane), n, v);
  }
}

template <typename T, PlaneKind kKind>
__global__ void __launch_bounds__(kBlockThreads, 2) unpack_votes_kernel(Rows rows, Unpack a) {
  constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));
  const int lane = lane_id();
  const Levels levels = {1.0f / a.divisor, -1.0f / a.divisor, 0.0f / a.divisor};
  for_chunks<kElementTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kElementTile>(row, start);
    T* out = device_pointer<T>(row.x) + start * kWordBits;
    if (n == kElementChunk && aligned<16>(row.x)) {
      unpack_chunk<T, kKind, kVectorWidth, true>(out, n, lane, row.word + start, levels, a);
    } else {
      unpack_chunk<T, kKind, 1, false>(out, n, lane, row.word + start, levels, a);
    }
  });
}

template <typename T>
void launch_typed(const Rows& rows, const Unpack& args, void* stream) {
  const auto run = [&](auto kernel) {
    launch_over<kElementTile>("unpack_votes", kernel, rows, stream, args);
  };
  switch (plane_kind(args.count, args.ranks)) {
    case PlaneKind::kSign:
      return run(unpack_votes_kernel<T, PlaneKind::kSign>);
    case PlaneKind::kSignNonZero:
      return run(unpack_votes_kernel<T, PlaneKind::kSignNonZero>);
    case PlaneKind::kCounts4:
      return run(unpack_votes_kernel<T, PlaneKind::kCounts4>);
    case PlaneKind::kCounts8:
      return run(unpack_votes_kernel<T, PlaneKind::kCounts8>);
    case PlaneKind::kCounts16:
      return run(unpack_votes_kernel<T, PlaneKind::kCounts16>);
  }
}

}  // namespace

void unpack_votes(const Rows& rows, DType dtype, const Unpack& args, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_typed<float>(rows, args, stream);
    case DType::kFloat16:
      return launch_typed<Half>(rows, args, stream);
    case DType::kBFloat16:
      return launch_typed<BFloat>(rows, args, stream);
  }
}

}  // namespace pydist::cuda
