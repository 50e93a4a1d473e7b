// What the CUDA kernels share: conversions, 16-byte access, bit transposition, the launcher.
//
// Portable on purpose: warps of 32, shuffles, ballots, vector types. Tests compile the same sources
// as plain C++ against stand-ins of CUDA's headers and run them on a CPU (docs/emulation.md); what
// they have no stand-in for (inline PTX) goes behind a function with a portable twin.
//
// How bits meet elements. A warp takes a chunk of up to 1,024 elements (32 words) in steps; in step
// k lane l holds the kWidth consecutive elements from kWidth * (32 * k + l), so that memory is read
// and written in whole lines. Over all steps a lane gathers 32 bits, kWidth of each step; a
// transposition between the 32 / kWidth lanes that share a word turns them into one word a lane.
// The transposition is its own inverse, so unpacking is the same thing backwards.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "../wire/lion.h"
#include "launch.h"

#define PYDIST_DEVICE static __device__ __forceinline__
#define PYDIST_DEVICE_MEMBER __device__ __forceinline__

// `extern __shared__ type name[]`, which the stand-ins spell otherwise.
#if defined(EMULATION)
#define PYDIST_DYNAMIC_SHARED(type, name) EMULATION_DYNAMIC_SHARED(type, name)
#else
#define PYDIST_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

// The most blocks of a launch; a warp then strides over tiles. Eight resident blocks on each of 132
// multiprocessors leave the last wave 97 % full. Emulated tests set it low to exercise the stride.
#if !defined(PYDIST_CUDA_MAX_BLOCKS)
#define PYDIST_CUDA_MAX_BLOCKS 8192
#endif

namespace pydist::cuda {

constexpr int kWarpSize = 32;
// Where ptxas would spill to fit one more block in, a kernel names the fewest to hold.
constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// ------------------------------------------------------------ registers

// A number that the compiler takes for a new one, so that it does not keep what it can make of it
// in registers for as long as a launch takes.
template <typename T>
PYDIST_DEVICE T afresh(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ------------------------------------------------------------ conversions

PYDIST_DEVICE float widen(float x) { return x; }
PYDIST_DEVICE float widen(BFloat x) { return to_float(x); }

// The hardware conversion is exact, as to_float is; only NaN payloads differ (the hardware makes
// its own NaN), and no payload is ever stored: narrow() writes the canonical one.
PYDIST_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

PYDIST_DEVICE void narrow(float x, float* out) { from_float(x, out); }
PYDIST_DEVICE void narrow(float x, BFloat* out) { from_float(x, out); }

// cvt.rn.f16.f32 rounds to nearest even, keeps subnormals and overflows to infinity from 65520, as
// from_float does; its NaN is 0x7FFF, so NaN is written by hand.
PYDIST_DEVICE void narrow(float x, Half* out) {
  const bool nan = (float_bits(x) & kAbsMask) > kInfBits;
  out->bits = nan ? uint16_t{0x7E00u} : __half_as_ushort(__float2half_rn(x));
}

// ------------------------------------------------------------ the step

// A captured graph repeats its launches with the arguments they had, so a step that advances from
// replay to replay must be read here.
template <typename Args>
PYDIST_DEVICE int64_t step_of(const Args& a) {
  return a.step_at ? *a.step_at : static_cast<int64_t>(a.step);
}

// ------------------------------------------------------------ memory

// An address of a row as a pointer. Told that it is device memory, the compiler emits global loads
// instead of generic ones.
template <typename T>
PYDIST_DEVICE T* device_pointer(int64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
}

template <int kBytes>
PYDIST_DEVICE bool aligned(int64_t address) {
  return address % kBytes == 0;
}

// The alignment that vector access to kWidth elements needs: at most 16 bytes at a time.
template <typename T, int kWidth>
constexpr int kVectorBytes =
    kWidth * static_cast<int>(sizeof(T)) < 16 ? kWidth * static_cast<int>(sizeof(T)) : 16;

// Words as elements and back, with constant indices only: everything stays in registers.
PYDIST_DEVICE void take(const uint32_t* raw, int j, float* out) { *out = bits_float(raw[j]); }
template <typename T>
PYDIST_DEVICE void take(const uint32_t* raw, int j, T* out) {
  out->bits = static_cast<uint16_t>(raw[j / 2] >> (16 * (j % 2)));
}
PYDIST_DEVICE void put(uint32_t* raw, int j, float x) { raw[j] = float_bits(x); }
template <typename T>
PYDIST_DEVICE void put(uint32_t* raw, int j, T x) {
  const uint32_t half = static_cast<uint32_t>(x.bits) << (16 * (j % 2));
  raw[j / 2] = j % 2 ? raw[j / 2] | half : half;
}

// v = x[i, i + kWidth). Vector access takes the whole run at once; scalar access reads each element
// below n and zeros above.
template <typename T, int kWidth, bool kVector>
PYDIST_DEVICE void load_run(const T* x, int i, int n, T (&v)[kWidth]) {
  if constexpr (kVector) {
    constexpr int kWords = kWidth * static_cast<int>(sizeof(T)) / 4;
    static_assert(kWords == 2 || kWords % 4 == 0, "runs are of 8, 16 or 32 bytes");
    uint32_t raw[kWords];
    if constexpr (kWords == 2) {
      const uint2 q = *reinterpret_cast<const uint2*>(x + i);
      raw[0] = q.x, raw[1] = q.y;
    } else {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        const uint4 q = reinterpret_cast<const uint4*>(x + i)[w / 4];
        raw[w] = q.x, raw[w + 1] = q.y, raw[w + 2] = q.z, raw[w + 3] = q.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) take(raw, j, &v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = i + j < n ? x[i + j] : T{};
  }
}

// x[i, i + kWidth) = v, the counterpart of load_run.
template <typename T, int kWidth, bool kVector>
PYDIST_DEVICE void store_run(T* x, int i, int n, const T (&v)[kWidth]) {
  if constexpr (kVector) {
    constexpr int kWords = kWidth * static_cast<int>(sizeof(T)) / 4;
    uint32_t raw[kWords];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) put(raw, j, v[j]);
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(x + i) = make_uint2(raw[0], raw[1]);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        reinterpret_cast<uint4*>(x + i)[w / 4] =
            make_uint4(raw[w], raw[w + 1], raw[w + 2], raw[w + 3]);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (i + j < n) x[i + j] = v[j];
    }
  }
}

// Payloads are little-endian and need not be aligned (a uint8 tensor may be any slice).
PYDIST_DEVICE uint32_t load_word_bytes(const unsigned char* p) {
  return p[0] | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}
PYDIST_DEVICE void store_word_bytes(unsigned char* p, uint32_t w) {
#pragma unroll
  for (int b = 0; b < 4; ++b) p[b] = static_cast<unsigned char>(w >> (8 * b));
}
PYDIST_DEVICE uint32_t load_word(const unsigned char* p) {
  if (aligned<4>(reinterpret_cast<int64_t>(p))) return *reinterpret_cast<const uint32_t*>(p);
  return load_word_bytes(p);
}
PYDIST_DEVICE void store_word(unsigned char* p, uint32_t w) {
  if (aligned<4>(reinterpret_cast<int64_t>(p))) {
    *reinterpret_cast<uint32_t*>(p) = w;
  } else {
    store_word_bytes(p, w);
  }
}

// ------------------------------------------------------------ bits of a warp

PYDIST_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % kWarpSize); }

// The word of a chunk that a lane holds on the payload's side of the transposition.
template <int kWidth>
PYDIST_DEVICE int word_of_lane(int lane) {
  constexpr int kSteps = kWordBits / kWidth;
  return kWidth * (lane % kSteps) + lane / kSteps;
}

// Transposes the matrix (lane within its group of 32 / kWidth, field of kWidth bits): log2 rounds,
// each exchanging half of every lane's fields with a neighbour. Its own inverse.
template <int kWidth>
PYDIST_DEVICE uint32_t transpose_bits(uint32_t bits, int lane) {
#pragma unroll
  for (int distance = kWordBits / kWidth / 2; distance >= 1; distance /= 2) {
    const int shift = distance * kWidth;
    const uint32_t low = 0xFFFFFFFFu / ((1u << shift) + 1u);  // fields whose index has this bit 0
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, distance);
    bits = lane & distance ? (bits & ~low) | ((other & ~low) >> shift)
                           : (bits & low) | ((other & low) << shift);
  }
  return bits;
}

// ORs into `flags` once a warp, and only if a lane saw something.
PYDIST_DEVICE void raise_flags(uint32_t* flags, bool raised, uint32_t value = kFlagNonFinite) {
  const bool any = __ballot_sync(kAllLanes, raised) != 0;
  if (flags && any && lane_id() == 0) atomicOr(flags, value);
}

// ------------------------------------------------------------ random bits

// 128 bits from any bit of the stream of Philox groups. Where the place is a multiple of 128 (the
// same for all lanes of a row) one group is enough.
PYDIST_DEVICE Philox4 draw_bits(const DrawKey& key, uint64_t place) {
  const Philox4 group = draw_group(key, place >> 7);
  const uint32_t offset = static_cast<uint32_t>(place & 127);
  if (offset == 0) return group;
  const Philox4 next = draw_group(key, (place >> 7) + 1);
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = group.v[i], w[i + 4] = next.v[i];
  // Shifts by two words and by one, chosen by bits of the offset: no indexed registers.
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = offset & 64 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = offset & 32 ? w[i + 1] : w[i];
  Philox4 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint64_t pair = static_cast<uint64_t>(w[i + 1]) << 32 | w[i];
    out.v[i] = static_cast<uint32_t>(pair >> (offset & 31));
  }
  return out;
}

// ------------------------------------------------------------ launching

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here is not reported again elsewhere
  throw std::runtime_error(std::string("pydist: CUDA error in ") + what + ": " +
                           cudaGetErrorString(status));
}

// The only place that launches. `name` is what an error message calls the kernel.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), unsigned grid, unsigned block,
            void* stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
  // The launch itself went well: what is left is of somebody else's.
  check(cudaGetLastError(), (std::string("a call before ") + name).c_str());
}

}  // namespace pydist::cuda
