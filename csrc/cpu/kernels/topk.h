// One block to its largest entries, and back; what the kernels of top-k blocks share.
#pragma once

#include "../simd/simd.h"

namespace pydist::cpu::PYDIST_ISA {

// Block `index` of the payload, `number` of its parameter.
struct TopKPlace {
  int64_t index, ordinal, number;
  int n;  // elements, at most format.block
};

// What the blocks before tell about the next one: which magnitude will leave a few candidates.
// Speed depends on it, results do not.
struct TopKGuess {
  uint32_t limit = 0;   // 0: nothing is known
  uint32_t margin = 0;  // of the limit below the smallest magnitude that was selected
};

// Writes the k largest entries of x[0, place.n), and leaves their positions in room.positions.
// Returns flags; where they say "not finite", the entries are NaN.
template <typename T>
uint32_t select_block(const T* x, const TopKPlace& place, const TopKEncode& a, const TopKRoom& room,
                      TopKGuess* guess);

// The positions of a block of n elements, ascending, to out[0, k). Reads the block's own words and
// nothing else. False where no encoder writes such bytes.
bool decode_positions(const TopKFormat& f, const unsigned char* block, int n, uint32_t* out);

// Value i of a block.
PYDIST_INLINE float decode_value(const TopKFormat& f, const unsigned char* block, int i) {
  if (f.values == DType::kFloat32) return bits_float(load_word(block + 4 * i));
  uint16_t bits;
  std::memcpy(&bits, block + 2 * i, sizeof(bits));
  return f.values == DType::kFloat16 ? to_float(Half{bits}) : to_float(BFloat{bits});
}

// Calls body(place, element) for the blocks of a piece; `element` is the block's first in the row.
template <typename Body>
PYDIST_INLINE void for_topk_blocks(const Row& row, int block, const Body& body) {
  for (int64_t i = 0; i < row.n; i += block) {
    const int64_t rest = row.n - i;
    body(TopKPlace{row.word + i / block, row.ordinal, (row.first + i) / block,
                   static_cast<int>(rest < block ? rest : block)},
         i);
  }
}

}  // namespace pydist::cpu::PYDIST_ISA
