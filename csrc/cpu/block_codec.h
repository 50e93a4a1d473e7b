// One block of elements to codes and scale, and back; what the kernels of block formats share.
// Blocks go in tiles, so that what is between two steps stays in the fastest cache.
#pragma once

#include "philox.h"
#include "simd.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kTile = 512;  // elements; a multiple of 32

// Block `index` of a row's piece that starts at element `first` of its parameter.
struct BlockPlace {
  int64_t index;  // in the payload
  int64_t first;  // element of the parameter
  int n;          // elements, at most format.block
};

// Writes codes and scale of x[0, place.n). Returns flags; where they say "not finite", the codes
// are zeros and the scale is NaN.
uint32_t encode_block(const float* x, const BlockPlace& place, const EncodeArgs& args,
                      const WidePhilox& philox);

// The values of one rank's block, stored to or (kAdd) added to out[0, n).
template <bool kAdd>
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

// ------------------------------------------------------------ codes and bits

// Bits of a code in each byte to a stream of kTile codes and back: eight codes are one 64-bit word,
// whose fields are pushed together in three steps. Plain loops that compilers turn into vectors;
// copies of a length that is not constant would become `rep movs`, which is slow to start.
// `n` is a multiple of 32; both arrays have room for eight bytes more than their codes take.
PYDIST_INLINE void copy_words(const unsigned char* from, size_t bytes, unsigned char* to) {
  for (size_t b = 0; b < bytes; b += 4) store_word(to + b, load_word(from + b));
}

template <typename Narrow>
PYDIST_INLINE void narrow_words(const uint64_t* words, int count, unsigned char* stream) {
  for (int i = 0; i < count; ++i) {
    const auto narrow = static_cast<Narrow>(words[i]);
    std::memcpy(stream + i * sizeof(Narrow), &narrow, sizeof(Narrow));
  }
}
template <typename Narrow>
PYDIST_INLINE void widen_words(const unsigned char* stream, int count, uint64_t* words) {
  for (int i = 0; i < count; ++i) {
    Narrow narrow;
    std::memcpy(&narrow, stream + i * sizeof(Narrow), sizeof(Narrow));
    words[i] = narrow;
  }
}

PYDIST_INLINE void pack_codes(const uint8_t* codes, int n, int bits, unsigned char* stream) {
  uint64_t words[kTile / 8];
  const int s1 = 8 - bits, s2 = 2 * s1, s3 = 2 * s2;
  for (int i = 0; i < n / 8; ++i) {
    uint64_t x;
    std::memcpy(&x, codes + 8 * i, 8);
    x = (x & 0x00FF00FF00FF00FFu) | ((x & 0xFF00FF00FF00FF00u) >> s1);
    x = (x & 0x0000FFFF0000FFFFu) | ((x & 0xFFFF0000FFFF0000u) >> s2);
    words[i] = (x & 0x00000000FFFFFFFFu) | ((x & 0xFFFFFFFF00000000u) >> s3);
  }
  if (bits == 4) return narrow_words<uint32_t>(words, n / 8, stream);
  if (bits == 2) return narrow_words<uint16_t>(words, n / 8, stream);
  if (bits == 1) return narrow_words<uint8_t>(words, n / 8, stream);
  for (int i = 0; i < n / 8; ++i) std::memcpy(stream + i * bits, &words[i], 8);
}

PYDIST_INLINE void unpack_codes(const unsigned char* stream, int n, int bits, uint8_t* codes) {
  uint64_t words[kTile / 8];
  if (bits == 4) {
    widen_words<uint32_t>(stream, n / 8, words);
  } else if (bits == 2) {
    widen_words<uint16_t>(stream, n / 8, words);
  } else if (bits == 1) {
    widen_words<uint8_t>(stream, n / 8, words);
  } else {
    for (int i = 0; i < n / 8; ++i) std::memcpy(&words[i], stream + i * bits, 8);
  }
  const int s1 = 8 - bits, s2 = 2 * s1, s3 = 2 * s2;
  const uint64_t low1 = 0x0001000100010001u * ((1u << bits) - 1u);
  const uint64_t low2 = 0x0000000100000001u * ((1u << (2 * bits)) - 1u);
  const uint64_t low3 = (uint64_t{1} << (4 * bits)) - 1u;
  for (int i = 0; i < n / 8; ++i) {
    uint64_t x = words[i];
    x = (x & low3) | ((x & (low3 << (4 * bits))) << s3);
    x = (x & low2) | ((x & (low2 << (2 * bits))) << s2);
    x = (x & low1) | ((x & (low1 << bits)) << s1);
    std::memcpy(codes + 8 * i, &x, 8);
  }
}

}  // namespace pydist::cpu::PYDIST_ISA
