// What a call on a device needs beside its codecs, so that the host waits for none of it: which
// parameters have a gradient, headers with flags and usage bits, NaN where a rank's input was not
// finite. A usage word is 1 where a parameter has a gradient that is not all zeros, else 0.
#include "../../wire/message.h"
#include "../rows.cuh"

namespace pydist::cuda {
namespace {

// ------------------------------------------------------------ who has a gradient

constexpr int kUsedBlocks = 16;  // thread blocks that look through one row
constexpr int kUsedLoads = 4;    // vectors of a thread at a time

// The bits of 16 bytes that are no sign, or-ed together.
template <typename U>
PYDIST_DEVICE uint32_t nonzero_bits(const uint4& q) {
  constexpr uint32_t kFirst = sizeof(U) == 2 ? 0x7FFF7FFFu : sizeof(U) == 4 ? kAbsMask : ~0u;
  constexpr uint32_t kSecond = sizeof(U) == 8 ? kAbsMask : kFirst;
  return ((q.x | q.z) & kFirst) | ((q.y | q.w) & kSecond);
}

// Whether one of x[i, i + 4 vectors) of this thread, of n elements, is anything but ±0.
template <typename U>
PYDIST_DEVICE bool any_nonzero(const U* x, int64_t begin, int64_t n, bool vector) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(U));
  constexpr U kNoSign = static_cast<U>(~U{0}) >> 1;
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kUsedLoads; ++k) {
    const int64_t i = begin + kWidth * (static_cast<int64_t>(k) * kBlockThreads + threadIdx.x);
    if (vector && i + kWidth <= n) {
      bits |= nonzero_bits<U>(*reinterpret_cast<const uint4*>(x + i));
    } else {
      for (int64_t j = i; j < i + kWidth && j < n; ++j) bits |= (x[j] & kNoSign) ? 1u : 0u;
    }
  }
  return bits != 0;
}

// Several blocks look through a row until one has found something; most rows end at once.
template <typename U>
__global__ void __launch_bounds__(kBlockThreads) find_used_kernel(Rows rows, uint32_t* used) {
  constexpr int64_t kStep = int64_t{kUsedLoads} * kBlockThreads * 16 / sizeof(U);
  const int64_t total = rows.count * kUsedBlocks;
  for (int64_t work = blockIdx.x; work < total; work += gridDim.x) {
    const Row row = row_at(rows, work / kUsedBlocks);
    const U* x = device_pointer<U>(row.x);
    const bool vector = aligned<16>(row.x);
    for (int64_t i = work % kUsedBlocks * kStep; i < row.n; i += kUsedBlocks * kStep) {
      bool found = any_nonzero(x, i, row.n, vector);
      if (threadIdx.x == 0) found = found || atomicOr(used + row.word, 0u);
      if (!__syncthreads_or(found)) continue;
      if (threadIdx.x == 0) atomicOr(used + row.word, 1u);
      break;
    }
  }
}

template <typename U>
void launch_find(const Rows& rows, uint32_t* used, void* stream) {
  const int64_t blocks = rows.count * kUsedBlocks;
  if (blocks <= 0) return;
  const int64_t most = PYDIST_CUDA_MAX_BLOCKS;
  const auto grid = static_cast<unsigned>(blocks < most ? blocks : most);
  launch("find_used", find_used_kernel<U>, grid, kBlockThreads, stream, rows, used);
}

// Row i is of parameter parts[i], int64 behind the rows.
__global__ void __launch_bounds__(kBlockThreads)
    keep_used_kernel(const Row* rows, int64_t count, const uint32_t* used, Row* out) {
  const auto* parts = reinterpret_cast<const int64_t*>(rows + count);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  for (; i < count; i += threads) {
    Row row = rows[i];
    if (!used[parts[i]]) row.momentum = row.momentum_out = 0;
    out[i] = row;
  }
}

// ------------------------------------------------------------ headers

// A header but for its flags, which the kernels fill in.
struct HeaderBytes {
  uint64_t low, high;

  PYDIST_DEVICE_MEMBER unsigned char at(int i) const {
    return static_cast<unsigned char>((i < 8 ? low : high) >> (8 * (i % 8)));
  }
};

constexpr int kFlagsAt = 7;

// A block a message: header, flags, and the usage words as bits, the first one lowest.
__global__ void __launch_bounds__(kBlockThreads)
    put_headers_kernel(unsigned char* messages, int64_t stride, HeaderBytes header,
                       const uint32_t* flags, const uint32_t* used, int64_t count, int64_t bytes) {
  unsigned char* out = messages + blockIdx.x * stride;
  if (threadIdx.x < kHeaderBytes) {
    const int i = static_cast<int>(threadIdx.x);
    out[i] = i == kFlagsAt ? static_cast<unsigned char>(*flags) : header.at(i);
  }
  for (int64_t b = threadIdx.x; b < bytes; b += kBlockThreads) {
    uint32_t bits = 0;
    for (int j = 0; j < 8; ++j) {
      const int64_t i = 8 * b + j;
      if (i < count && used[i]) bits |= 1u << j;
    }
    out[kHeaderBytes + b] = static_cast<unsigned char>(bits);
  }
}

// One block: the flags of all messages or-ed; a header that is not this call's is malformed. A
// parameter is used where any message says so.
__global__ void __launch_bounds__(kBlockThreads)
    merge_headers_kernel(const unsigned char* messages, int64_t count, int64_t stride,
                         HeaderBytes header, uint32_t* flags, uint32_t* used, int64_t parts) {
  uint32_t seen = 0;
  for (int64_t r = threadIdx.x; r < count; r += kBlockThreads) {
    const unsigned char* from = messages + r * stride;
    for (int i = 0; i < kHeaderBytes; ++i) {
      if (i == kFlagsAt) {
        seen |= from[i];
      } else if (from[i] != header.at(i)) {
        seen |= kFlagMalformed;
      }
    }
  }
  if (seen) atomicOr(flags, seen);
  for (int64_t i = threadIdx.x; i < parts; i += kBlockThreads) {
    uint32_t any = 0;
    for (int64_t r = 0; r < count; ++r) {
      any |= messages[r * stride + kHeaderBytes + i / 8] >> (i % 8) & 1u;
    }
    used[i] = any;
  }
}

// ------------------------------------------------------------ results

// Reads a few words where all is well. U is an unsigned type as wide as an element.
template <typename U>
__global__ void __launch_bounds__(kBlockThreads)
    fill_nan_kernel(U* x, int64_t n, U nan, const uint32_t* flags, int64_t words) {
  uint32_t seen = 0;
  for (int64_t i = 0; i < words; ++i) seen |= flags[i];
  if (!(seen & (kFlagNonFinite | kFlagMalformed))) return;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  for (; i < n; i += threads) x[i] = nan;
}

constexpr int kFillBlocks = 264;  // two for each multiprocessor: most calls have nothing to fill

template <typename U>
void launch_fill(uint64_t x, int64_t n, U nan, const uint32_t* flags, int64_t words, void* stream) {
  const int64_t blocks = (n + kBlockThreads - 1) / kBlockThreads;
  if (blocks <= 0) return;
  const auto grid = static_cast<unsigned>(blocks < kFillBlocks ? blocks : kFillBlocks);
  launch("fill_nan", fill_nan_kernel<U>, grid, kBlockThreads, stream, reinterpret_cast<U*>(x), n,
         nan, flags, words);
}

}  // namespace

void find_used(const Rows& rows, int64_t itemsize, uint32_t* used, void* stream) {
  if (itemsize == 8) return launch_find<uint64_t>(rows, used, stream);
  if (itemsize == 4) return launch_find<uint32_t>(rows, used, stream);
  launch_find<uint16_t>(rows, used, stream);
}

void keep_used(const Row* rows, int64_t count, const uint32_t* used, Row* out, void* stream) {
  if (count <= 0) return;
  const int64_t blocks = (count + kBlockThreads - 1) / kBlockThreads;
  const int64_t most = PYDIST_CUDA_MAX_BLOCKS;
  launch("keep_used", keep_used_kernel, static_cast<unsigned>(blocks < most ? blocks : most),
         kBlockThreads, stream, rows, count, used, out);
}

void put_headers(unsigned char* messages, int64_t count, int64_t stride, uint64_t low,
                 uint64_t high, const uint32_t* flags, const uint32_t* used, int64_t parts,
                 int64_t bytes, void* stream) {
  if (count <= 0) return;
  const HeaderBytes header = {low, high};
  launch("put_headers", put_headers_kernel, static_cast<unsigned>(count), kBlockThreads, stream,
         messages, stride, header, flags, used, parts, bytes);
}

void merge_headers(const unsigned char* messages, int64_t count, int64_t stride, uint64_t low,
                   uint64_t high, uint32_t* flags, uint32_t* used, int64_t parts, void* stream) {
  const HeaderBytes header = {low, high};
  launch("merge_headers", merge_headers_kernel, 1u, kBlockThreads, stream, messages, count, stride,
         header, flags, used, parts);
}

void fill_nan(uint64_t x, int64_t n, int64_t itemsize, uint64_t nan, const uint32_t* flags,
              int64_t words, void* stream) {
  if (itemsize == 4) return launch_fill(x, n, static_cast<uint32_t>(nan), flags, words, stream);
  if (itemsize == 2) return launch_fill(x, n, static_cast<uint16_t>(nan), flags, words, stream);
  launch_fill(x, n, nan, flags, words, stream);
}

}  // namespace pydist::cuda
