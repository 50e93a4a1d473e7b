// ternary_scale: the scaler of each row.
//
// Two launches: a warp sums a segment of 4,096 elements, then a block of threads adds up the
// segments of a row. Sums have one order on every backend: lane l adds elements l, l + 32, …
#include "../../wire/ternary.h"
#include "blocks.cuh"

// Segments of a row that are added up at a time. Emulated tests set it low to have several tiles.
#if !defined(PYDIST_CUDA_ROW_TILE)
#define PYDIST_CUDA_ROW_TILE 4096
#endif

namespace pydist::cuda {
namespace {

PYDIST_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

PYDIST_DEVICE uint32_t warp_largest(uint32_t largest) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  return largest;
}

PYDIST_DEVICE float warp_sum(float sum) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) {
    sum = sum + bits_float(__shfl_xor_sync(kAllLanes, float_bits(sum), distance));
  }
  return sum;
}

// ------------------------------------------------------------ segments

constexpr int kLaneValues = kSumSegment / kWarpSize;

// sum + (x / 2^e)^2, given 2^-e.
PYDIST_DEVICE float plus_square(float sum, float x, float factor) {
  const float y = x * factor;
  return sum + y * y;
}

// A whole segment. Its squares need the largest first, so a lane keeps its values: memory is read
// once, with all loads of the lane in flight.
template <typename T>
PYDIST_DEVICE SegmentSum sum_segment(const T* x, int lane) {
  float v[kLaneValues];
#pragma unroll
  for (int k = 0; k < kLaneValues; ++k) v[k] = widen(x[kWarpSize * k + lane]);
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kLaneValues; ++k) largest = larger(largest, float_bits(v[k]) & kAbsMask);
  largest = warp_largest(largest);
  if (largest >= kInfBits) return {largest, 0.0f};
  const float factor = power_of_two(-sum_exponent(largest));
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kLaneValues; ++k) sum = plus_square(sum, v[k], factor);
  return {largest, warp_sum(sum)};
}

// The last segment of a row, which may be short.
template <typename T>
PYDIST_DEVICE SegmentSum sum_short_segment(const T* x, int n, int lane) {
  uint32_t largest = 0;
#pragma unroll 8
  for (int i = lane; i < n; i += kWarpSize) {
    largest = larger(largest, float_bits(widen(x[i])) & kAbsMask);
  }
  largest = warp_largest(largest);
  if (largest >= kInfBits) return {largest, 0.0f};
  const float factor = power_of_two(-sum_exponent(largest));
  float sum = 0.0f;
#pragma unroll 8
  for (int i = lane; i < n; i += kWarpSize) sum = plus_square(sum, widen(x[i]), factor);
  return {largest, warp_sum(sum)};
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    ternary_segments_kernel(Rows rows, SegmentSum* sums) {
  const int lane = lane_id();
  for_blocks(rows, kSumSegment, [&](const Row& row, int64_t index, int64_t begin, int n) {
    const T* x = device_pointer<T>(row.x) + begin;
    const SegmentSum sum = n == kSumSegment ? sum_segment(x, lane) : sum_short_segment(x, n, lane);
    if (lane == 0) sums[index] = sum;
  });
}

// ------------------------------------------------------------ rows

constexpr int kRowThreads = 1024;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kRowTile = PYDIST_CUDA_ROW_TILE;
static_assert(kRowTile % kWarpSize == 0, "a lane keeps its place in the order");

// The largest of all threads of the block, on all of them.
PYDIST_DEVICE uint32_t block_largest(uint32_t largest, uint32_t* warps) {
  largest = warp_largest(largest);
  if (lane_id() == 0) warps[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  return warp_largest(warps[lane_id()]);
}

// The sum of a row's segments in units of 2^(2 * top), on the lanes of warp 0. All threads rescale
// what the warp then adds up in order.
PYDIST_DEVICE float sum_row(const SegmentSum* sums, int64_t count, int top, float* tile) {
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t base = 0; base < count; base += kRowTile) {
    const int n = static_cast<int>(count - base < kRowTile ? count - base : kRowTile);
    const int rounded = (n + kWarpSize - 1) / kWarpSize * kWarpSize;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < rounded; i += kRowThreads) {
      const SegmentSum part = i < n ? sums[base + i] : SegmentSum{0, 0.0f};
      tile[i] = rescaled_squares(part.squares, part.largest, top);
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
#pragma unroll 16
      for (int i = lane_id(); i < rounded; i += kWarpSize) sum = sum + tile[i];
    }
    __syncthreads();  // the tile is written anew
  }
  return warp_sum(sum);
}

__global__ void __launch_bounds__(kRowThreads, 1)
    ternary_scale_kernel(Rows rows, TernaryScaleArgs a, uint32_t* flags) {
  __shared__ float tile[kRowTile];
  __shared__ uint32_t warps[kRowWarps];
  static_assert(kRowWarps == kWarpSize, "a lane reads what each warp found");
  bool finite = true;
#pragma unroll 1
  for (int64_t r = blockIdx.x; r < rows.count; r += gridDim.x) {
    const Row row = row_at(rows, r);
    const SegmentSum* sums = a.scratch + row.word;
    const int64_t count = (row.n + kSumSegment - 1) / kSumSegment;
    uint32_t largest = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += kRowThreads) {
      largest = larger(largest, sums[i].largest);
    }
    largest = block_largest(largest, warps);
    const int top = sum_exponent(largest);
    const float sum = sum_row(sums, count, top, tile);
    const float mean = row.n ? sum / static_cast<float>(row.n) : 0.0f;
    float scaler = bits_float(kNanBits);
    if (largest < kInfBits) scaler = scaler_of(a.clip, largest, __fsqrt_rn(mean), top);
    if (threadIdx.x == 0) {
      store_word(device_pointer<unsigned char>(row.momentum), float_bits(scaler));
    }
    finite = finite && largest < kInfBits;
    __syncthreads();  // what the warps found is written anew
  }
  raise_flags(flags, threadIdx.x == 0 && !finite);
}

template <typename T>
void launch_scale(const Rows& rows, const TernaryScaleArgs& a, uint32_t* flags, void* stream) {
  launch_blocks("ternary_scale", ternary_segments_kernel<T>, rows, stream, a.scratch);
  if (rows.count == 0) return;
  const auto grid = static_cast<unsigned>(
      rows.count < PYDIST_CUDA_MAX_BLOCKS ? rows.count : PYDIST_CUDA_MAX_BLOCKS);
  launch("ternary_scale", ternary_scale_kernel, grid, kRowThreads, stream, rows, a, flags);
}

}  // namespace

void ternary_scale(const Rows& rows, DType dtype, const TernaryScaleArgs& args, uint32_t* flags,
                   void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_scale<float>(rows, args, flags, stream);
    case DType::kFloat16:
      return launch_scale<Half>(rows, args, flags, stream);
    case DType::kBFloat16:
      return launch_scale<BFloat>(rows, args, flags, stream);
  }
}

}  // namespace pydist::cuda
