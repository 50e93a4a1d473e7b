// Codes of blocks as bytes, for kernels that look at one code after another.
#pragma once

#include "block_codec.h"

namespace pydist::cpu::PYDIST_ISA {

// Bits of a code in each byte to a stream of kTile codes and back: eight codes are one 64-bit word,
// whose fields are pushed together in three steps. Plain loops that compilers turn into vectors.
// `n` is a multiple of 32; both arrays have room for eight bytes more than their codes take.
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

// The codes of a tile of `count` elements that begin at `from`, a byte each, up to a multiple of
// 32: in place, or unpacked. `stream` has room for kTile + 8 bytes, `unpacked` for kTile.
PYDIST_INLINE const uint8_t* tile_codes(const BlockFormat& f, const unsigned char* from, int count,
                                        unsigned char* stream, uint8_t* unpacked) {
  const int padded = (count + 31) / 32 * 32;
  const auto size = static_cast<size_t>(code_bytes(f, count));
  for (size_t b = 0; b < size; b += 64) prefetch(from + b, kAhead / 2);
  // Reading in place stays within the codes, but for a tail and for codes that are no power of 2.
  const bool in_place = count == padded && (f.bits & (f.bits - 1)) == 0;
  if (!in_place) {
    std::memset(stream, 0, kTile + 8);
    copy_words(from, size, stream);
  }
  const unsigned char* bytes = in_place ? from : stream;
  if (f.bits == 8) return bytes;
  unpack_codes(bytes, padded, f.bits, unpacked);
  return unpacked;
}

}  // namespace pydist::cpu::PYDIST_ISA
