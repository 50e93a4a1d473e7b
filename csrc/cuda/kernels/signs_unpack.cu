// unpack_votes: the values of a vote, from sign planes (±1, 0) or count planes (sum or mean).
//
// Reads the bits of the planes, writes every element once; values are divided by `divisor` with
// IEEE rounding (sign planes know two or three values, which are divided once).
#include "../division.cuh"
#include "signs_planes.cuh"

namespace pydist::cuda {
namespace {

// What a vote can come to, already divided and stored as T: of a majority the three values, of
// small counts one a lane, that of count lane % 16.
template <typename T, PlaneKind kKind>
struct Levels {
  T plus, minus, zero;
};
template <typename T>
struct Levels<T, PlaneKind::kCounts4> {
  uint32_t bits;
};

template <typename T, PlaneKind kKind>
PYDIST_DEVICE Levels<T, kKind> levels_of(const Unpack& a, const Divisor& d, int lane) {
  Levels<T, kKind> levels = {};
  if constexpr (kKind == PlaneKind::kCounts4) {
    T level;
    const int votes = 2 * (lane % (1 << kNibble)) - static_cast<int>(a.ranks);
    narrow(divided(static_cast<float>(votes), d), &level);
    put(&levels.bits, 0, level);
  } else {
    narrow(divided(1.0f, d), &levels.plus);
    narrow(divided(-1.0f, d), &levels.minus);
    narrow(divided(0.0f, d), &levels.zero);
  }
  return levels;
}

// The value of element first + offset (see LaneVotes). All lanes call it together.
template <typename T, PlaneKind kKind>
PYDIST_DEVICE T decoded(const LaneVotes<kKind>& votes, int first, int offset,
                        const Levels<T, kKind>& levels, int ranks, const Divisor& d) {
  T value;
  if constexpr (kKind == PlaneKind::kCounts4) {
    // Lanes are numbered modulo 32 and two hold each level: bits above the nibble do not matter.
    const auto from = static_cast<int>(votes.nibble(0, first, offset));
    const uint32_t bits = __shfl_sync(kAllLanes, levels.bits, from);
    take(&bits, 0, &value);
  } else if constexpr (kCounts<kKind>) {
    narrow(divided(votes.value(first, offset, ranks), d), &value);
  } else {
    const int bit = first + offset;
    value = (votes.planes[0] >> bit) & 1u ? levels.plus : levels.minus;
    if constexpr (kKind == PlaneKind::kSignNonZero) {
      value = (votes.planes[1] >> bit) & 1u ? value : levels.zero;
    }
  }
  return value;
}

template <typename T, PlaneKind kKind, int kWidth, bool kVector>
PYDIST_DEVICE void unpack_chunk(T* out, int n, int lane, int64_t word,
                                const Levels<T, kKind>& levels, const Unpack& a, const Divisor& d,
                                int64_t message) {
  constexpr int kSteps = kWordBits / kWidth;
  constexpr bool kCheap = kKind <= PlaneKind::kCounts4;  // wide counts are divided one by one
  const int ranks = static_cast<int>(a.ranks);
  constexpr int kBatch = !kVector ? kNibble : kCheap ? kSteps : 2;
  const LaneVotes<kKind> votes =
      load_votes<kKind, kWidth>(a.planes + message, a.plane_bytes, a.count, word, n, lane);
#pragma unroll 1
  for (int k0 = 0; k0 < kSteps; k0 += kBatch) {
    if (!kVector && k0 * kWidth * kWarpSize >= n) break;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      T v[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        v[j] = decoded(votes, kWidth * k0, kWidth * k + j, levels, ranks, d);
      }
      store_run<T, kWidth, kVector>(out, kWidth * ((k0 + k) * kWarpSize + lane), n, v);
    }
  }
}

template <typename T, PlaneKind kKind>
__global__ void __launch_bounds__(kBlockThreads, 2) unpack_votes_kernel(Rows rows, Unpack a) {
  constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));
  const int lane = lane_id();
  const Divisor d(a.divisor);
  const Levels<T, kKind> levels = levels_of<T, kKind>(a, d, lane);
  for_chunks<kElementTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kElementTile>(row, start);
    T* out = device_pointer<T>(row.x) + start * kWordBits;
    if (n == kElementChunk && aligned<16>(row.x)) {
      unpack_chunk<T, kKind, kVectorWidth, true>(out, n, lane, row.word + start, levels, a, d,
                                                 row.message);
    } else {
      unpack_chunk<T, kKind, 1, false>(out, n, lane, row.word + start, levels, a, d, row.message);
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
