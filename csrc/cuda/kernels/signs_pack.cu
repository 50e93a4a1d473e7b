// pack_signs: one bit per element, 1 for positive; zeros take zero_bit, NaN takes 0.
//
// A warp turns 1,024 elements into 32 words (see common.cuh); reads 4 or 2 bytes per element,
// writes one bit, and ORs into `flags` if any element is not finite.
#include "../rows.cuh"

namespace pydist::cuda {
namespace {

// The words of one chunk, one a lane, and the largest absolute bit pattern among its elements.
template <typename T, bool kZeroBit, int kWidth, bool kVector>
PYDIST_DEVICE uint32_t pack_chunk(const T* x, int n, int lane, uint32_t* largest) {
  constexpr int kSteps = kWordBits / kWidth;
  constexpr int kBatch = kSteps < 8 ? kSteps : 8;  // loads in flight
  uint32_t bits = 0;
  for (int k0 = 0; k0 < kSteps; k0 += kBatch) {
    if (!kVector && k0 * kWidth * kWarpSize >= n) break;
    T v[kBatch][kWidth];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      load_run<T, kWidth, kVector>(x, kWidth * ((k0 + k) * kWarpSize + lane), n, v[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float value = widen(v[k][j]);
        const bool positive = kZeroBit ? value >= 0.0f : value > 0.0f;
        bits |= (positive ? 1u : 0u) << (kWidth * (k0 + k) + j);
        const uint32_t magnitude = float_bits(value) & kAbsMask;
        *largest = magnitude > *largest ? magnitude : *largest;
      }
    }
  }
  return transpose_bits<kWidth>(bits, lane);
}

template <typename T, bool kZeroBit>
__global__ void __launch_bounds__(kBlockThreads)
    pack_signs_kernel(Rows rows, unsigned char* payload, uint32_t* flags) {
  constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));
  const int lane = lane_id();
  uint32_t largest = 0;
  for_chunks<kElementTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kElementTile>(row, start);
    const T* x = device_pointer<T>(row.x) + start * kWordBits;
    int word = lane;
    uint32_t bits;
    if (n == kElementChunk && aligned<16>(row.x)) {
      bits = pack_chunk<T, kZeroBit, kVectorWidth, true>(x, n, lane, &largest);
      word = word_of_lane<kVectorWidth>(lane);
    } else {
      bits = pack_chunk<T, kZeroBit, 1, false>(x, n, lane, &largest);
    }
    const int rest = n - word * kWordBits;
    if (rest > 0)
      store_word(payload + row.message + 4 * (row.word + start + word), bits & word_mask(rest));
  });
  raise_flags(flags, largest >= kInfBits);
}

template <typename T>
void launch_typed(const Rows& rows, unsigned char* payload, uint32_t zero_bit, uint32_t* flags,
                  void* stream) {
  launch_over<kElementTile>("pack_signs",
                            zero_bit ? pack_signs_kernel<T, true> : pack_signs_kernel<T, false>,
                            rows, stream, payload, flags);
}

}  // namespace

void pack_signs(const Rows& rows, DType dtype, unsigned char* payload, uint32_t zero_bit,
                uint32_t* flags, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_typed<float>(rows, payload, zero_bit, flags, stream);
    case DType::kFloat16:
      return launch_typed<Half>(rows, payload, zero_bit, flags, stream);
    case DType::kBFloat16:
      return launch_typed<BFloat>(rows, payload, zero_bit, flags, stream);
  }
}

}  // namespace pydist::cuda
