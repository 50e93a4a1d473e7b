// elias_encode and elias_decode: the codes of blocks as Elias-coded streams, and back.
#define PYDIST_LITTLE_ENDIAN_WORDS  // every processor that this is compiled for
#include "../wire/elias.h"

#include "code_bytes.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

// ------------------------------------------------------------ writing

// Bits to bytes, none behind those that were put.
struct BitWriter {
  unsigned char* out;
  uint64_t bits;
  int have;
};

PYDIST_INLINE void put_bits(BitWriter& w, uint64_t bits, int length) {  // at most 63
  w.bits |= bits << w.have;
  w.have += length;
  if (w.have < 64) return;
  std::memcpy(w.out, &w.bits, 8);
  w.out += 8;
  w.have -= 64;
  w.bits = bits >> (length - w.have);  // w.have < length
}

PYDIST_INLINE unsigned char* end_of(BitWriter& w) {  // padded to a whole byte
  for (; w.have > 0; w.have -= 8, w.bits >>= 8) *w.out++ = static_cast<unsigned char>(w.bits);
  return w.out;
}

// The words of every code of a format, and of short gaps.
struct Words {
  static constexpr int kGaps = 128;
  uint32_t dense[256], sparse[256], gap[kGaps];
  uint8_t dense_length[256], sparse_length[256], gap_length[kGaps];
  uint8_t length_of_width[18];  // of an omega code, by the width of its number
};

void make_words(const BlockFormat& f, Words& words) {
  const int top = top_of(f);
  for (int code = 0; code < 1 << f.bits; ++code) {
    const int level = level_of(static_cast<uint32_t>(code), top);
    const BitCode dense = dense_code(level);
    const BitCode sparse = level ? signed_omega(level > 0, magnitude_of(level)) : BitCode{0, 0};
    words.dense[code] = static_cast<uint32_t>(dense.bits);
    words.sparse[code] = static_cast<uint32_t>(sparse.bits);
    words.dense_length[code] = static_cast<uint8_t>(dense.length);
    words.sparse_length[code] = static_cast<uint8_t>(sparse.length);
  }
  for (int g = 1; g < Words::kGaps; ++g) {
    const BitCode gap = omega(static_cast<uint32_t>(g));
    words.gap[g] = static_cast<uint32_t>(gap.bits);
    words.gap_length[g] = static_cast<uint8_t>(gap.length);
  }
  for (int width = 1; width < 18; ++width) {
    words.length_of_width[width] = static_cast<uint8_t>(omega_length(1u << (width - 1)));
  }
}

PYDIST_INLINE uint64_t load_eight(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

// Calls body(place) for the codes that are not `top`; all eight of the last run are there.
template <typename Body>
PYDIST_INLINE void for_nonzero(const uint8_t* codes, int n, int top, const Body& body) {
  const uint64_t zeros = 0x0101010101010101u * static_cast<uint64_t>(top);
  for (int i = 0; i < n; i += 8) {
    for (uint64_t x = load_eight(codes + i) ^ zeros; x;) {
      const int byte = __builtin_ctzll(x) / 8;
      if (i + byte >= n || !body(i + byte)) return;
      x &= byte < 7 ? ~uint64_t{0} << (8 * byte + 8) : 0;
    }
  }
}

// Bits of the sparse stream, or some number above `least`; how many levels are not zero.
int64_t sparse_length(const Words& words, const uint8_t* codes, int n, int top, int64_t least,
                      uint32_t* count) {
  int64_t bits = kModeBits;
  int before = -1;
  uint32_t nonzero = 0;
  for_nonzero(codes, n, top, [&](int i) {
    const int width = 32 - __builtin_clz(static_cast<unsigned>(i - before));
    bits += words.length_of_width[width] + words.sparse_length[codes[i]];
    before = i;
    ++nonzero;
    return bits <= least;
  });
  *count = nonzero;
  return bits + omega_length(nonzero + 1);
}

unsigned char* write_sparse(const Words& words, const uint8_t* codes, int n, int top,
                            uint32_t count, unsigned char* out) {
  const BitCode head = joined({static_cast<uint64_t>(StreamMode::kSparse), kModeBits},
                              omega(count + 1));
  BitWriter w = {out, head.bits, head.length};
  int before = -1;
  for_nonzero(codes, n, top, [&](int i) {
    const int gap = i - before;
    if (gap < Words::kGaps) {
      put_bits(w, words.gap[gap], words.gap_length[gap]);
    } else {
      const BitCode code = omega(static_cast<uint32_t>(gap));
      put_bits(w, code.bits, code.length);
    }
    put_bits(w, words.sparse[codes[i]], words.sparse_length[codes[i]]);
    before = i;
    return true;
  });
  return end_of(w);
}

unsigned char* write_dense(const Words& words, const uint8_t* codes, int n, unsigned char* out) {
  BitWriter w = {out, static_cast<uint64_t>(StreamMode::kDense), kModeBits};
  for (int i = 0; i < n; ++i) put_bits(w, words.dense[codes[i]], words.dense_length[codes[i]]);
  return end_of(w);
}

// The codes behind two bits of mode: every byte moves up by two bits.
unsigned char* write_plain(const BlockFormat& f, const uint8_t* codes, int n, unsigned char* out) {
  unsigned char* const end = out + stream_limit(f, n);
  auto carried = static_cast<unsigned char>(StreamMode::kPlain);
  for (int i = 0; i < n; i += kTile) {
    const int count = n - i < kTile ? n - i : kTile;
    alignas(64) uint8_t padded[kTile] = {};
    std::memcpy(padded, codes + i, static_cast<size_t>(count));
    alignas(64) unsigned char stream[kTile + 8];
    pack_codes(padded, (count + 31) / 32 * 32, f.bits, stream);
    const int bytes = (count * f.bits + 7) / 8;
    out[0] = static_cast<unsigned char>(stream[0] << kModeBits | carried);
    for (int b = 1; b < bytes; ++b) {
      out[b] = static_cast<unsigned char>(stream[b] << kModeBits | stream[b - 1] >> (8 - kModeBits));
    }
    carried = static_cast<unsigned char>(stream[bytes - 1] >> (8 - kModeBits));
    out += bytes;
  }
  if (out < end) *out = carried;  // a block whose last byte has room for the two bits ends here
  return end;
}

// The codes of a block, a byte each, no larger than 2 * top; zeros up to a multiple of 32.
void unpack_block(const BlockFormat& f, const unsigned char* from, int n, uint8_t* codes) {
  const auto most = static_cast<uint8_t>(2 * top_of(f));
  for (int i = 0; i < n; i += kTile) {
    const int count = n - i < kTile ? n - i : kTile;
    alignas(64) unsigned char stream[kTile + 8];
    alignas(64) uint8_t unpacked[kTile];
    const uint8_t* tile =
        tile_codes(f, from + static_cast<int64_t>(i) * f.bits / 8, count, stream, unpacked);
    for (int j = 0; j < (count + 31) / 32 * 32; ++j) {
      codes[i + j] = tile[j] < most ? tile[j] : most;
    }
  }
}

unsigned char* encode_stream(const BlockFormat& f, const Words& words, const uint8_t* codes, int n,
                             unsigned char* out) {
  const int top = top_of(f);
  const int64_t plain = kModeBits + static_cast<int64_t>(n) * f.bits;
  int64_t dense = kModeBits, bits;
  for (int i = 0; i < n; ++i) dense += words.dense_length[codes[i]];
  uint32_t count;
  const int64_t sparse =
      sparse_length(words, codes, n, top, dense < plain ? dense : plain, &count);
  switch (shortest(sparse, dense, plain, &bits)) {
    case StreamMode::kSparse:
      return write_sparse(words, codes, n, top, count, out);
    case StreamMode::kDense:
      return write_dense(words, codes, n, out);
    case StreamMode::kPlain:
      break;
  }
  return write_plain(f, codes, n, out);
}

// ------------------------------------------------------------ reading

// What the first bits of a dense stream say: a level and the length of its word, 0 where the word is
// longer than the table sees.
struct DenseTable {
  static constexpr int kBits = 11;
  int8_t level[1 << kBits];
  uint8_t length[1 << kBits];
};

const DenseTable& dense_table() {
  static const DenseTable* const table = [] {
    auto* made = new DenseTable{};
    for (int level = -15; level <= 15; ++level) {
      const BitCode code = dense_code(level);
      for (uint32_t rest = 0; code.length + bit_width(rest) <= DenseTable::kBits; ++rest) {
        const auto at = code.bits | static_cast<uint64_t>(rest) << code.length;
        made->level[at] = static_cast<int8_t>(level);
        made->length[at] = static_cast<uint8_t>(code.length);
      }
    }
    return made;
  }();
  return *table;
}

Fault read_dense(BitReader& r, int n, int top, uint8_t* codes) {
  const DenseTable& table = dense_table();
  constexpr uint32_t kMask = (1u << DenseTable::kBits) - 1u;
  for (int i = 0; i < n; ++i) {
    if (r.have < DenseTable::kBits) refill(r);
    const uint32_t at = static_cast<uint32_t>(r.bits) & kMask;
    const int level = table.level[at], length = table.length[at];
    if (length && length <= r.have && level <= top && level >= -top) {
      consume(r, length);
      codes[i] = static_cast<uint8_t>(top + level);
      continue;
    }
    uint32_t code;
    if (const Fault fault = read_dense_level(r, top, &code)) return fault;
    codes[i] = static_cast<uint8_t>(code);
  }
  return kFine;
}

struct SparseSink {  // zeros are there already
  uint8_t* out;
  __attribute__((always_inline)) void zeros(int count) { out += count; }
  __attribute__((always_inline)) void put(uint32_t code) { *out++ = static_cast<uint8_t>(code); }
};

Fault read_plain(BitReader& r, int bits, int n, int top, uint8_t* codes) {
  for (int i = 0; i < n; ++i) {
    uint32_t code;
    if (const Fault fault = read_plain_level(r, bits, top, &code)) return fault;
    codes[i] = static_cast<uint8_t>(code);
  }
  return kFine;
}

// Codes of one stream, a byte each, up to a multiple of 32 of them.
Fault decode_stream(const BlockFormat& f, const unsigned char* begin, const unsigned char* end,
                    int n, uint8_t* codes) {
  const int top = top_of(f);
  BitReader r = bit_reader(begin, end);
  uint32_t mode;
  Fault fault = read_bits(r, kModeBits, &mode);
  if (fault) return fault;
  if (mode == static_cast<uint32_t>(StreamMode::kSparse)) {
    std::memset(codes, top, static_cast<size_t>(n));
    SparseSink sink = {codes};
    fault = read_sparse(r, n, top, sink);
  } else if (mode == static_cast<uint32_t>(StreamMode::kDense)) {
    fault = read_dense(r, n, top, codes);
  } else if (mode == static_cast<uint32_t>(StreamMode::kPlain)) {
    fault = read_plain(r, f.bits, n, top, codes);
  } else {
    return kBadMode;
  }
  return fault ? fault : read_end(r);
}

// Codes to their fixed places, `room` bytes of them.
void pack_block(const BlockFormat& f, const uint8_t* codes, int n, int64_t room,
                unsigned char* out) {
  int64_t at = 0;
  for (int i = 0; i < n; i += kTile) {
    const int count = n - i < kTile ? n - i : kTile;
    const int padded = (count + 31) / 32 * 32;
    alignas(64) uint8_t tile[kTile];
    std::memcpy(tile, codes + i, static_cast<size_t>(count));
    std::memset(tile + count, 0, static_cast<size_t>(padded - count));
    alignas(64) unsigned char stream[kTile + 8];
    pack_codes(tile, padded, f.bits, stream);
    const int64_t bytes = code_bytes(f, count);
    copy_words(stream, static_cast<size_t>(bytes), out + at);
    at += bytes;
  }
  std::memset(out + at, 0, static_cast<size_t>(room - at));
}

}  // namespace

int64_t elias_encode(const Row& row, const EliasArgs& a, int64_t first, unsigned char* streams,
                     float* scratch) {
  const BlockFormat& f = a.format;
  Words words;
  make_words(f, words);
  auto* const codes = reinterpret_cast<uint8_t*>(scratch);
  unsigned char* out = streams;
  for_blocks(row, f.block, [&](const BlockPlace& place, int64_t) {
    const uint32_t scale = load_word(a.fixed_scales + 4 * place.index);
    if (!is_nan_scale(scale)) {
      unpack_block(f, a.codes + place.index * block_bytes(f), place.n, codes);
      out = encode_stream(f, words, codes, place.n, out);
    }
    store_word(a.scales + 4 * first, scale);
    store_word(a.ends + 4 * first, static_cast<uint32_t>(out - streams));
    ++first;
  });
  return out - streams;
}

int64_t elias_decode(const Row& row, const EliasArgs& a, int64_t first, float* scratch) {
  const BlockFormat& f = a.format;
  auto* const codes = reinterpret_cast<uint8_t*>(scratch);
  int64_t worst = kNoFault;
  int64_t begin = first ? load_word(a.ends + 4 * (first - 1)) : 0;
  for_blocks(row, f.block, [&](const BlockPlace& place, int64_t) {
    const int64_t end = load_word(a.ends + 4 * first);
    const uint32_t scale = load_word(a.scales + 4 * first);
    Fault fault = check_place(a, begin, end, place.n, scale);
    if (!fault && begin < end) {
      fault = decode_stream(f, a.streams + begin, a.streams + end, place.n, codes);
    }
    const int64_t at = place.index * block_bytes(f);
    const int64_t left = a.code_bytes - at;
    const int64_t room = left < block_bytes(f) ? left : block_bytes(f);
    const bool zeros = fault || begin >= end;
    pack_block(f, codes, zeros ? 0 : place.n, room, a.codes + at);
    store_word(a.fixed_scales + 4 * place.index, scale);
    if (fault && worst == kNoFault) worst = fault_at(first, fault);
    begin = end;
    ++first;
  });
  return worst;
}

}  // namespace pydist::cpu::PYDIST_ISA
