// Blocks of levels as streams of variable length: what kernels are told, Elias's omega code, and
// the decoder that both backends share. pydist/reference/elias.py executes the same.
//
// Bit j of a stream is bit j % 8 of its byte j / 8. A code word enters it in the order in which it
// is written on paper, so here, where bit 0 is the first, words are the mirror image of that.
#pragma once

#include "blocks.h"

namespace pydist {

// A payload of fixed length and one of variable length, for encoding and decoding alike. Block j of
// the work (rows one behind the other, without gaps) has the j-th place in `ends` and `scales`, and
// place row.word + its place in the row among codes and fixed_scales.
struct EliasArgs {
  BlockFormat format;  // levels
  unsigned char* codes;
  unsigned char* fixed_scales;
  int64_t code_bytes;
  unsigned char* ends;     // uint32 little-endian: where each block's stream ends
  unsigned char* scales;   // float32, copied
  unsigned char* streams;  // stream_bytes of room, or of what was received
  int64_t stream_bytes;
  int64_t* result;  // encoding: bytes of all streams; decoding: the first fault, or kNoFault
};

enum class StreamMode : uint32_t { kSparse = 0, kDense = 1, kPlain = 2 };
constexpr int kModeBits = 2;

// Why a block is malformed. REASONS of pydist/reference/elias.py has the words.
enum Fault : int {
  kFine = 0,
  kTruncated = 1,
  kBadMode = 2,
  kLongCount = 3,
  kHighLevel = 4,
  kBadGap = 5,
  kLeftOver = 6,
  kBadTable = 7,
  kBadScale = 8,
};

// Faults order by block, so that the smallest is the first.
constexpr int64_t kNoFault = INT64_MAX;
PYDIST_INLINE int64_t fault_at(int64_t block, int fault) { return block * 16 + fault; }

PYDIST_INLINE bool is_nan_scale(uint32_t bits) { return (bits & kAbsMask) > kInfBits; }

// ------------------------------------------------------------ words

struct BitCode {
  uint64_t bits;  // the first in bit 0
  int length;
};

PYDIST_INLINE int bit_width(uint32_t v) {
  int width = 0;
  for (int step = 16; step; step /= 2) {
    if (v >> step) {
      v >>= step;
      width += step;
    }
  }
  return width + static_cast<int>(v);
}

PYDIST_INLINE uint32_t mirrored(uint32_t v, int width) {
  v = (v & 0x55555555u) << 1 | (v >> 1 & 0x55555555u);
  v = (v & 0x33333333u) << 2 | (v >> 2 & 0x33333333u);
  v = (v & 0x0F0F0F0Fu) << 4 | (v >> 4 & 0x0F0F0F0Fu);
  v = (v & 0x00FF00FFu) << 8 | (v >> 8 & 0x00FF00FFu);
  return (v << 16 | v >> 16) >> (32 - width);
}

// Elias omega (1975) of v >= 1: the number in binary, before it one less than its length, and so
// on; a 0 ends it. At most 28 bits up to 65,537.
PYDIST_INLINE BitCode omega(uint32_t v) {
  BitCode code = {0, 1};
  while (v > 1) {
    const int width = bit_width(v);
    code.bits = code.bits << width | mirrored(v, width);
    code.length += width;
    v = static_cast<uint32_t>(width - 1);
  }
  return code;
}

PYDIST_INLINE int omega_length(uint32_t v) {
  int length = 1;
  while (v > 1) {
    const int width = bit_width(v);
    length += width;
    v = static_cast<uint32_t>(width - 1);
  }
  return length;
}

PYDIST_INLINE BitCode joined(BitCode a, BitCode b) {
  return {a.bits | b.bits << a.length, a.length + b.length};
}

PYDIST_INLINE BitCode signed_omega(uint32_t sign, uint32_t v) {  // a nonzero level
  return joined({sign, 1}, omega(v));
}

// ------------------------------------------------------------ levels

PYDIST_INLINE int top_of(const BlockFormat& f) { return (1 << (f.bits - 1)) - 1; }

// No encoder writes 2 * top + 1; it decodes as the code below it, and travels as that.
PYDIST_INLINE int level_of(uint32_t code, int top) {
  const int level = static_cast<int>(code) - top;
  return level < top ? level : top;
}
PYDIST_INLINE uint32_t magnitude_of(int level) {
  return static_cast<uint32_t>(level < 0 ? -level : level);
}

// A level in a dense stream.
PYDIST_INLINE BitCode dense_code(int level) {
  const BitCode magnitude = omega(magnitude_of(level) + 1);
  if (level == 0) return magnitude;
  return joined(magnitude, {level > 0 ? 1u : 0u, 1});
}

// The shortest stream; plain before dense before sparse where they are equal.
PYDIST_INLINE StreamMode shortest(int64_t sparse, int64_t dense, int64_t plain, int64_t* bits) {
  StreamMode mode = StreamMode::kPlain;
  *bits = plain;
  if (dense < *bits) mode = StreamMode::kDense, *bits = dense;
  if (sparse < *bits) mode = StreamMode::kSparse, *bits = sparse;
  return mode;
}

// The most bytes that the stream of n elements takes.
PYDIST_INLINE int64_t stream_limit(const BlockFormat& f, int64_t n) {
  return (kModeBits + n * f.bits + 7) / 8;
}

// ------------------------------------------------------------ reading

// Bits from the bytes before `end`, none beyond. What is missing reads as zeros and is found out
// when it is consumed. CPU kernels define PYDIST_LITTLE_ENDIAN_WORDS and load eight bytes at once.
struct BitReader {
  const unsigned char* p;
  const unsigned char* end;
  uint64_t bits;
  int have;  // real bits in `bits`
};

PYDIST_INLINE BitReader bit_reader(const unsigned char* begin, const unsigned char* end) {
  return {begin, end, 0, 0};
}

// Brings 57 bits or more, or all there are. What stands above `have` is what comes next, or zeros:
// it may be brought again.
PYDIST_INLINE void refill(BitReader& r) {
#if defined(PYDIST_LITTLE_ENDIAN_WORDS)
  if (r.end - r.p >= 8 && r.have <= 56) {
    uint64_t word;
    __builtin_memcpy(&word, r.p, 8);
    r.bits |= word << r.have;
    const int taken = (64 - r.have) / 8;
    r.p += taken;
    r.have += 8 * taken;
    return;
  }
#endif
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // inlined in many places, unrolled in each: then nvcc spills
#endif
  while (r.have <= 56 && r.p < r.end) {
    r.bits |= static_cast<uint64_t>(*r.p++) << r.have;
    r.have += 8;
  }
}

PYDIST_INLINE bool consume(BitReader& r, int count) {
  if (count > r.have) return false;
  r.bits = count < 64 ? r.bits >> count : 0;
  r.have -= count;
  return true;
}

// A word of 1 ... most (below 2^17) into *v; `larger` is what a larger one means.
PYDIST_INLINE Fault read_omega(BitReader& r, uint32_t most, Fault larger, uint32_t* v) {
  refill(r);  // no word that passes is longer than this
  const int widest = bit_width(most);
  uint32_t value = 1;
  while (r.bits & 1) {
    const int width = static_cast<int>(value) + 1;
    if (width > widest) return larger;
    const uint32_t group = static_cast<uint32_t>(r.bits) & ((1u << width) - 1u);
    if (!consume(r, width)) return kTruncated;
    value = mirrored(group, width);
  }
  if (!consume(r, 1)) return kTruncated;
  *v = value;
  return value > most ? larger : kFine;
}

PYDIST_INLINE Fault read_bits(BitReader& r, int count, uint32_t* v) {  // at most 16
  if (r.have < count) refill(r);
  *v = static_cast<uint32_t>(r.bits) & ((1u << count) - 1u);
  return consume(r, count) ? kFine : kTruncated;
}

// Nothing but the padding of the last byte is left.
PYDIST_INLINE Fault read_end(const BitReader& r) {
  return r.p < r.end || r.have >= 8 || r.bits != 0 ? kLeftOver : kFine;
}

// The codes of a block of n elements: sink.zeros(count) and sink.put(code) get all n, or those
// before a fault.
template <typename Sink>
PYDIST_INLINE Fault read_sparse(BitReader& r, int n, int top, Sink& sink) {
  uint32_t count, gap, sign, magnitude;
  Fault fault = read_omega(r, static_cast<uint32_t>(n) + 1, kLongCount, &count);
  if (fault) return fault;
  int left = n;
  for (uint32_t k = 1; k < count; ++k) {
    if (left == 0) return kBadGap;
    if ((fault = read_omega(r, static_cast<uint32_t>(left), kBadGap, &gap))) return fault;
    if ((fault = read_bits(r, 1, &sign))) return fault;
    if ((fault = read_omega(r, static_cast<uint32_t>(top), kHighLevel, &magnitude))) return fault;
    const int level = static_cast<int>(magnitude);
    sink.zeros(static_cast<int>(gap) - 1);
    sink.put(static_cast<uint32_t>(sign ? top + level : top - level));
    left -= static_cast<int>(gap);
  }
  sink.zeros(left);
  return kFine;
}

PYDIST_INLINE Fault read_dense_level(BitReader& r, int top, uint32_t* code) {
  uint32_t magnitude, sign = 1;
  Fault fault = read_omega(r, static_cast<uint32_t>(top) + 1, kHighLevel, &magnitude);
  if (fault) return fault;
  if (magnitude > 1 && (fault = read_bits(r, 1, &sign))) return fault;
  const int level = static_cast<int>(magnitude) - 1;
  *code = static_cast<uint32_t>(sign ? top + level : top - level);
  return kFine;
}

PYDIST_INLINE Fault read_plain_level(BitReader& r, int bits, int top, uint32_t* code) {
  const Fault fault = read_bits(r, bits, code);
  if (fault) return fault;
  return *code > 2u * static_cast<uint32_t>(top) ? kHighLevel : kFine;
}

// Where block j's stream is, and whether its place and its scale can be right.
PYDIST_INLINE Fault check_place(const EliasArgs& a, int64_t begin, int64_t end, int64_t n,
                                uint32_t scale) {
  if (begin > end || end > a.stream_bytes || end - begin > stream_limit(a.format, n)) {
    return kBadTable;
  }
  return is_nan_scale(scale) != (begin == end) ? kBadScale : kFine;
}

// Whether nothing but zeros up to a multiple of four bytes is behind the last stream.
PYDIST_INLINE bool padded_to_word(const EliasArgs& a, int64_t end) {
  if (a.stream_bytes - end > 3) return false;
  for (; end < a.stream_bytes; ++end) {
    if (a.streams[end]) return false;
  }
  return true;
}

}  // namespace pydist
