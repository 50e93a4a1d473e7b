// What the bytes of a payload mean: sizes, tables and codes shared by every backend.
//
// No torch, no Python, no standard-library templates: this header is compiled for every CPU
// instruction set and by nvcc, so everything in it has internal linkage (an inline function with
// external linkage could be merged by the linker into its AVX-512 copy and crash an older CPU).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYDIST_INLINE static __host__ __device__ __forceinline__
#else
#define PYDIST_INLINE static inline __attribute__((always_inline))
#endif

namespace pydist {

// Bumped whenever a byte on the wire changes its meaning; exchanged in every handshake.
constexpr int kWireVersion = 2;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What the reducer answers where exactly half of the ranks voted +1.
enum class Ties : int { kHash = 0, kZero = 1, kPositive = 2 };

// Bits of the `flags` word that kernels OR into.
constexpr uint32_t kFlagNonFinite = 1;
constexpr uint32_t kFlagMalformed = 4;  // what was read no encoder has written

// Largest number of ranks a vote may have: counts then fit 16 bit planes.
constexpr int64_t kMaxRanks = 65535;
constexpr int kMaxPlanes = 16;

// A payload is made of little-endian 32-bit words; element i of a row is bit i % 32 of word i / 32.
constexpr int kWordBits = 32;

// A contiguous run of elements of one parameter: where they are in memory, where their bits are in
// the payload, and which elements of which parameter they are. A row starts on a word boundary.
// Python builds tables of these as int64[rows, 9]; the fields a kernel does not need are zero.
struct Row {
  int64_t x;             // address of the input, the parameter or the output
  int64_t momentum;      // address of the old momentum or residual; of a residual null: none
  int64_t momentum_out;  // address of the new momentum (equal to `momentum` for in place)
  int64_t n;             // elements
  int64_t word;          // first payload word
  int64_t ordinal;       // the parameter's place in named_parameters()
  int64_t first;         // index of the row's first element inside the parameter
  int64_t words_before;  // words of all rows before this one: device code searches by it
  int64_t message;       // bytes before the message that the row is in; a multiple of 4
};
static_assert(sizeof(Row) == 72, "Python builds rows of nine int64");

PYDIST_INLINE int64_t words_for(int64_t n) { return (n + kWordBits - 1) / kWordBits; }

// Bits needed to hold a count of 0 ... ranks.
PYDIST_INLINE int planes_for(int64_t ranks) {
  int planes = 0;
  while (ranks >> planes) ++planes;
  return planes;
}

// Ones at the places of the first n (1 ... 32) elements of a word: padding bits are always 0.
PYDIST_INLINE uint32_t word_mask(int64_t n) {
  return n >= kWordBits ? 0xFFFFFFFFu : (1u << n) - 1u;
}

}  // namespace pydist
