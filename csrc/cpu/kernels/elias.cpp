// elias_encode and elias_decode: the codes of blocks as Elias-coded streams, and back.
#define PYDIST_LITTLE_ENDIAN_WORDS  // every processor that this is compiled for
#include "../../wire/elias.h"

#include "blocks.h"

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
  static constexpr int kField = 21;
  uint64_t lengths[256];  // dense, sparse, 1 where it is not zero; in fields
  uint32_t dense[256], sparse[256], gap[kGaps];
  uint8_t dense_length[256], sparse_length[256], gap_length[kGaps];
  uint8_t length_of_width[18];  // of an omega code, by the width of its number
  uint8_t zero;                 // the code of level 0
};

void make_words(const BlockFormat& f, Words& words) {
  const int top = top_of(f);
  words.zero = static_cast<uint8_t>(top);
  for (int code = 0; code < 1 << f.bits; ++code) {
    const int level = level_of(static_cast<uint32_t>(code), top);
    const BitCode dense = dense_code(level);
    const BitCode sparse = level ? signed_omega(level > 0, magnitude_of(level)) : BitCode{0, 0};
    words.dense[code] = static_cast<uint32_t>(dense.bits);
    words.sparse[code] = static_cast<uint32_t>(sparse.bits);
    words.lengths[code] = static_cast<uint64_t>(dense.length) |
                          static_cast<uint64_t>(sparse.length) << Words::kField |
                          uint64_t{level != 0} << 2 * Words::kField;
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

// Where a block's codes are not those of zero, a bit each. Summed lengths of dense words, and of
// signs and levels of sparse ones.
struct Summary {
  int64_t dense, levels;
  int64_t nonzero;
};

Summary summarize(const Words& words, const uint8_t* codes, int n, uint64_t* masks) {
  // Three sums in one: no field overflows its 21 bits in 65,536 elements of at most 15 bits.
  uint64_t sum = 0;
  for (int i = 0; i < n; ++i) sum += words.lengths[codes[i]];
  const uint64_t zeros = 0x0101010101010101u * words.zero;
  for (int i = 0; i < n; i += 64) {
    uint64_t mask = 0;
    for (int j = i; j < n && j < i + 64; j += 8) {
      uint64_t x;
      std::memcpy(&x, codes + j, 8);
      x ^= zeros;
      constexpr uint64_t kLow = 0x7F7F7F7F7F7F7F7Fu;
      x = (((x & kLow) + kLow) | x) & ~kLow;  // the highest bit of bytes that are not zero
      mask |= (x >> 7) * 0x0102040810204080u >> 56 << (j - i);
    }
    masks[i / 64] = n - i < 64 ? mask & ((uint64_t{1} << (n - i)) - 1) : mask;
  }
  constexpr uint64_t kField = (1u << Words::kField) - 1;
  return {static_cast<int64_t>(sum & kField), static_cast<int64_t>(sum >> Words::kField & kField),
          static_cast<int64_t>(sum >> 2 * Words::kField)};
}

// Calls body(place) for every bit that is set, from the first on.
template <typename Body>
PYDIST_INLINE void for_nonzero(const uint64_t* masks, int n, const Body& body) {
  for (int i = 0; i < n; i += 64) {
    for (uint64_t mask = masks[i / 64]; mask; mask &= mask - 1) body(i + __builtin_ctzll(mask));
  }
}

// Bits of the words of all gaps.
int64_t gap_lengths(const Words& words, const uint64_t* masks, int n) {
  int64_t bits = 0;
  int before = -1;
  for_nonzero(masks, n, [&](int i) {
    bits += words.length_of_width[32 - __builtin_clz(static_cast<unsigned>(i - before))];
    before = i;
  });
  return bits;
}

unsigned char* write_sparse(const Words& words, const uint8_t* codes, int n, const uint64_t* masks,
                            uint32_t count, unsigned char* out) {
  const BitCode head =
      joined({static_cast<uint64_t>(StreamMode::kSparse), kModeBits}, omega(count + 1));
  BitWriter w = {out, head.bits, head.length};
  int before = -1;
  for_nonzero(masks, n, [&](int i) {
    const int gap = i - before;
    const uint64_t level = words.sparse[codes[i]];
    const int length = words.sparse_length[codes[i]];
    if (gap < Words::kGaps) {
      put_bits(w, words.gap[gap] | level << words.gap_length[gap], words.gap_length[gap] + length);
    } else {
      const BitCode code = omega(static_cast<uint32_t>(gap));
      put_bits(w, code.bits | level << code.length, code.length + length);
    }
    before = i;
  });
  return end_of(w);
}

unsigned char* write_dense(const Words& words, const uint8_t* codes, int n, unsigned char* out) {
  BitWriter w = {out, static_cast<uint64_t>(StreamMode::kDense), kModeBits};
  int i = 0;
  for (; i + 4 <= n; i += 4) {  // 4 * 15 bits at most
    const uint8_t* c = codes + i;
    const int first = words.dense_length[c[0]] + words.dense_length[c[1]];
    const int second = words.dense_length[c[2]] + words.dense_length[c[3]];
    const uint64_t low = words.dense[c[0]] | uint64_t{words.dense[c[1]]}
                                                 << words.dense_length[c[0]];
    const uint64_t high = words.dense[c[2]] | uint64_t{words.dense[c[3]]}
                                                  << words.dense_length[c[2]];
    put_bits(w, low | high << first, first + second);
  }
  for (; i < n; ++i) put_bits(w, words.dense[codes[i]], words.dense_length[codes[i]]);
  return end_of(w);
}

// A tile of codes to a byte each and back; 8 bits are bytes already. Both arrays hold kTile.
PYDIST_INLINE void unpack_tile(const unsigned char* stream, int n, int bits, uint8_t* codes) {
  if (bits < 8) return unpack_codes(stream, n, bits, codes);
  std::memcpy(codes, stream, static_cast<size_t>(n));
}
PYDIST_INLINE void pack_tile(const uint8_t* codes, int n, int bits, unsigned char* stream) {
  if (bits < 8) return pack_codes(codes, n, bits, stream);
  std::memcpy(stream, codes, static_cast<size_t>(n));
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
    pack_tile(padded, (count + 31) / 32 * 32, f.bits, stream);
    const int bytes = (count * f.bits + 7) / 8;
    out[0] = static_cast<unsigned char>(stream[0] << kModeBits | carried);
    for (int b = 1; b < bytes; ++b) {
      out[b] =
          static_cast<unsigned char>(stream[b] << kModeBits | stream[b - 1] >> (8 - kModeBits));
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
    const int padded = (count + 31) / 32 * 32;
    alignas(64) unsigned char stream[kTile + 8] = {};
    copy_words(from + static_cast<int64_t>(i) * f.bits / 8,
               static_cast<size_t>(code_bytes(f, count)), stream);
    alignas(64) uint8_t tile[kTile];
    unpack_tile(stream, padded, f.bits, tile);
    for (int j = 0; j < padded; ++j) {
      codes[i + j] = tile[j] < most ? tile[j] : most;
    }
  }
}

unsigned char* encode_stream(const BlockFormat& f, const Words& words, const uint8_t* codes, int n,
                             uint64_t* masks, unsigned char* out) {
  const Summary sums = summarize(words, codes, n, masks);
  const auto nonzero = static_cast<uint32_t>(sums.nonzero);
  const int64_t plain = kModeBits + static_cast<int64_t>(n) * f.bits;
  const int64_t dense = kModeBits + sums.dense;
  int64_t sparse = kModeBits + omega_length(nonzero + 1) + sums.levels, bits;
  const int64_t other = dense < plain ? dense : plain;
  // A gap takes a bit or more: often that says enough.
  sparse += sparse + nonzero < other ? gap_lengths(words, masks, n) : nonzero;
  switch (shortest(sparse, dense, plain, &bits)) {
    case StreamMode::kSparse:
      return write_sparse(words, codes, n, masks, nonzero, out);
    case StreamMode::kDense:
      return write_dense(words, codes, n, out);
    case StreamMode::kPlain:
      break;
  }
  return write_plain(f, codes, n, out);
}

// ------------------------------------------------------------ reading

constexpr int kSeen = 11;  // bits that tables look at
constexpr uint32_t kSeenMask = (1u << kSeen) - 1u;

// What those bits say of a dense stream: the codes of up to four levels, and their bits together.
struct DenseEntry {
  uint8_t codes[4];
  uint8_t count, length;  // 0 where not even one word ends, or one is of no level here
};

struct DenseTable {
  DenseEntry entry[1 << kSeen];
};

DenseTable* make_dense_table(int top) {
  auto* table = new DenseTable{};
  for (uint32_t seen = 0; seen <= kSeenMask; ++seen) {
    DenseEntry& entry = table->entry[seen];
    BitReader r = {nullptr, nullptr, seen, kSeen};
    uint32_t code;
    while (entry.count < 4 && read_dense_level(r, top, &code) == kFine) {
      entry.codes[entry.count++] = static_cast<uint8_t>(code);
      entry.length = static_cast<uint8_t>(kSeen - r.have);
    }
  }
  return table;
}

const DenseTable& dense_table(int bits) {
  static const DenseTable* const tables[] = {
      make_dense_table(1),  make_dense_table(3),  make_dense_table(7),  make_dense_table(15),
      make_dense_table(31), make_dense_table(63), make_dense_table(127)};
  return *tables[bits - 2];
}

Fault read_dense(BitReader& r, int bits, int n, int top, uint8_t* codes) {
  const DenseTable& table = dense_table(bits);
  for (int i = 0; i < n;) {
    if (r.have < kSeen) refill(r);
    const DenseEntry entry = table.entry[r.bits & kSeenMask];
    if (entry.count && entry.length <= r.have && i + 4 <= n) {
      std::memcpy(codes + i, entry.codes, 4);
      i += entry.count;
      consume(r, entry.length);
      continue;
    }
    uint32_t code;
    if (const Fault fault = read_dense_level(r, top, &code)) return fault;
    codes[i++] = static_cast<uint8_t>(code);
  }
  return kFine;
}

struct OmegaTable {
  uint8_t value[1 << kSeen], length[1 << kSeen];  // 0 where the word is longer
};

const OmegaTable& omega_table() {
  static const OmegaTable* const table = [] {
    auto* made = new OmegaTable{};
    for (uint32_t seen = 0; seen <= kSeenMask; ++seen) {
      BitReader r = {nullptr, nullptr, seen, kSeen};
      uint32_t value;
      if (read_omega(r, 255, kHighLevel, &value) != kFine) continue;
      made->value[seen] = static_cast<uint8_t>(value);
      made->length[seen] = static_cast<uint8_t>(kSeen - r.have);
    }
    return made;
  }();
  return *table;
}

// As read_omega.
PYDIST_INLINE Fault look_up_omega(const OmegaTable& table, BitReader& r, uint32_t most,
                                  Fault larger, uint32_t* v) {
  if (r.have < kSeen) refill(r);
  const uint32_t seen = static_cast<uint32_t>(r.bits) & kSeenMask;
  *v = table.value[seen];
  if (*v == 0 || *v > most || table.length[seen] > r.have) return read_omega(r, most, larger, v);
  consume(r, table.length[seen]);
  return kFine;
}

// As read_sparse of elias.h; the codes hold zeros.
Fault read_sparse_codes(BitReader& r, int n, int top, uint8_t* codes) {
  const OmegaTable& table = omega_table();
  uint32_t count, gap, sign, magnitude;
  Fault fault = read_omega(r, static_cast<uint32_t>(n) + 1, kLongCount, &count);
  if (fault) return fault;
  const uint32_t highest = static_cast<uint32_t>(top);
  int at = -1;
  for (uint32_t k = 1; k < count; ++k) {
    if (at == n - 1) return kBadGap;
    fault = look_up_omega(table, r, static_cast<uint32_t>(n - 1 - at), kBadGap, &gap);
    if (fault || (fault = read_bits(r, 1, &sign))) return fault;
    if ((fault = look_up_omega(table, r, highest, kHighLevel, &magnitude))) return fault;
    at += static_cast<int>(gap);
    codes[at] = static_cast<uint8_t>(sign ? highest + magnitude : highest - magnitude);
  }
  return kFine;
}

// Reads codes one by one, and finds what is wrong with them.
Fault read_plain(BitReader& r, int bits, int n, int top, uint8_t* codes) {
  for (int i = 0; i < n; ++i) {
    uint32_t code;
    if (const Fault fault = read_plain_level(r, bits, top, &code)) return fault;
    codes[i] = static_cast<uint8_t>(code);
  }
  return kFine;
}

// The same for a stream that is long enough: every byte moves down by two bits. False where a code
// is too high.
bool copy_plain(const BlockFormat& f, const unsigned char* from, const unsigned char* end, int n,
                uint8_t* codes) {
  uint8_t highest = 0;
  for (int i = 0; i < n; i += kTile) {
    const int count = n - i < kTile ? n - i : kTile;
    const int padded = (count + 31) / 32 * 32;
    alignas(64) unsigned char stream[kTile + 8] = {};
    const int64_t left = end - from;
    const int bytes = (count * f.bits + 7) / 8;
    const int both = left > bytes ? bytes : static_cast<int>(left) - 1;
    for (int b = 0; b < both; ++b) {
      stream[b] = static_cast<unsigned char>(from[b] >> kModeBits | from[b + 1] << (8 - kModeBits));
    }
    if (both < bytes) stream[both] = static_cast<unsigned char>(from[both] >> kModeBits);
    alignas(64) uint8_t tile[kTile];
    unpack_tile(stream, padded, f.bits, tile);
    for (int j = 0; j < count; ++j) highest = tile[j] > highest ? tile[j] : highest;
    std::memcpy(codes + i, tile, static_cast<size_t>(count));
    from += bytes;
  }
  return highest <= 2 * top_of(f);
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
    fault = read_sparse_codes(r, n, top, codes);
  } else if (mode == static_cast<uint32_t>(StreamMode::kDense)) {
    fault = read_dense(r, f.bits, n, top, codes);
  } else if (mode != static_cast<uint32_t>(StreamMode::kPlain)) {
    return kBadMode;
  } else if (end - begin == stream_limit(f, n) && copy_plain(f, begin, end, n, codes)) {
    const int used = static_cast<int>((kModeBits + static_cast<int64_t>(n) * f.bits) % 8);
    return used && end[-1] >> used ? kLeftOver : kFine;
  } else {
    fault = read_plain(r, f.bits, n, top, codes);
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
    pack_tile(tile, padded, f.bits, stream);
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
  auto* const codes = reinterpret_cast<uint8_t*>(scratch);  // a block of bytes, then bits
  auto* const masks = reinterpret_cast<uint64_t*>(scratch + f.block);
  unsigned char* out = streams;
  for_blocks(row, f.block, [&](const BlockPlace& place, int64_t) {
    const uint32_t scale = load_word(a.fixed_scales + 4 * place.index);
    if (!is_nan_scale(scale)) {
      unpack_block(f, a.codes + place.index * block_bytes(f), place.n, codes);
      out = encode_stream(f, words, codes, place.n, masks, out);
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
