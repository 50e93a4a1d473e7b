// One block of elements to codes and scale, and back; what the kernels of block formats share.
// Blocks go in tiles, so that what is between two steps stays in the fastest cache.
#pragma once

#include "../simd/philox.h"
#include "../simd/simd.h"
#include "blocks_bits.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kTile = 512;  // elements; a multiple of 32

// Block `index` of a row's piece that starts at element `first` of its parameter.
struct BlockPlace {
  int64_t index;  // in the payload
  int64_t first;  // element of the parameter
  int n;          // elements, at most format.block
};

// Writes codes and scale of x[0, place.n), whose largest magnitude has the bits `largest`. Returns
// flags; where they say "not finite", the codes are zeros and the scale is NaN.
uint32_t encode_block(const float* x, uint32_t largest, const BlockPlace& place,
                      const EncodeArgs& args, const WidePhilox& philox);

// What becomes of a block's values: stored, added to what is there, or stored past the caches
// (aligned float32 that nobody reads soon).
enum class Put { kStore, kAdd, kStream };

// The values of one rank's block, put into out[0, n).
template <Put kPut>
void decode_block(const BlockFormat& format, const unsigned char* codes, const unsigned char* scale,
                  int n, float* out);

// out[0, n) = the sum of all ranks' values of a block, divided by args.divisor.
void sum_block(const DecodeArgs& args, int64_t index, int n, float* out);

// Calls body(place, element) for the blocks of a piece; `element` is the block's first in the row.
template <typename Body>
PYDIST_INLINE void for_blocks(const Row& row, int block, const Body& body) {
  for (int64_t i = 0; i < row.n; i += block) {
    const int64_t rest = row.n - i;
    body(BlockPlace{row.word + i / block, row.first + i,
                    static_cast<int>(rest < block ? rest : block)},
         i);
  }
}

// Copies of a length that is not constant would become `rep movs`, or a call.
PYDIST_INLINE void copy_words(const unsigned char* from, size_t bytes, unsigned char* to) {
  for (size_t b = 0; b < bytes; b += 4) store_word(to + b, load_word(from + b));
}

}  // namespace pydist::cpu::PYDIST_ISA
