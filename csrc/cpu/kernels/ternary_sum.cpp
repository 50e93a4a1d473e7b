// ternary_sum, ternary_unpack, ternary_unpack_sums: trits of all ranks to their exact sums, sums to
// bit planes and back, sums to values.
#include "../simd/convert.h"
#include "../table.h"
#include "ternary.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

constexpr int kTileBytes = kUnitsTile / kDigits;

// The digits of a byte are summed side by side in one word: a field of 12 bits each, which holds
// the sum of trit + 1 of 2,047 ranks.
constexpr int kFieldBits = 12;
constexpr uint64_t kFieldMask = (1u << kFieldBits) - 1u;
constexpr int64_t kMostInField = 2047;

struct FieldTable {
  uint64_t fields[256] = {};
  constexpr FieldTable() {
    for (int byte = 0; byte < 256; ++byte) {
      int rest = byte > kLargestByte ? 0 : byte;  // a malformed byte is five zeros
      for (int i = 0; i < kDigits; ++i) {
        const uint64_t trit = rest % 3 == 2 ? 0 : rest % 3 + 1;
        fields[byte] |= trit << (i * kFieldBits);
        rest /= 3;
      }
    }
  }
};
constexpr FieldTable kTable;

PYDIST_INLINE bool has_malformed(const unsigned char* bytes, int count) {
  unsigned char largest = 0;
  for (int k = 0; k < count; ++k) largest = bytes[k] > largest ? bytes[k] : largest;
  return largest > kLargestByte;
}

// A rank's bytes of some units, of which the payload may hold less; what is missing is zero.
const unsigned char* units_at(const TernarySource& from, int64_t rank, int64_t unit, int units,
                              unsigned char* room) {
  const int64_t begin = unit * kUnitBytes, size = units * kUnitBytes;
  const unsigned char* data = from.data + rank * from.stride + begin;
  if (begin + size <= from.bytes) return data;
  std::memcpy(room, data, from.bytes - begin);
  std::memset(room + (from.bytes - begin), 0, begin + size - from.bytes);
  return room;
}

// sums[0, units * kUnit) = the sums of all ranks' trits. Returns flags.
uint32_t sum_tile(const TernarySource& from, int64_t unit, int units, int32_t* sums) {
  alignas(64) uint64_t fields[kTileBytes];
  alignas(64) unsigned char room[kTileBytes];
  const int count = units * kUnitBytes;
  bool bad = false;
  std::memset(sums, 0, units * kUnit * sizeof(int32_t));
  for (int64_t first = 0; first < from.ranks; first += kMostInField) {
    const int64_t rest = from.ranks - first;
    const auto ranks = static_cast<int32_t>(rest < kMostInField ? rest : kMostInField);
    std::memset(fields, 0, count * sizeof(uint64_t));
    for (int64_t rank = first; rank < first + ranks; ++rank) {
      const unsigned char* bytes = units_at(from, rank, unit, units, room);
      bad = has_malformed(bytes, count) || bad;
      for (int k = 0; k < count; ++k) fields[k] += kTable.fields[bytes[k]];
    }
    for (int u = 0; u < units; ++u) {
      for (int i = 0; i < kDigits; ++i) {
        int32_t* sum = sums + u * kUnit + i * kUnitBytes;
        const uint64_t* field = fields + u * kUnitBytes;
        for (int k = 0; k < kUnitBytes; ++k) {
          sum[k] += static_cast<int32_t>((field[k] >> (i * kFieldBits)) & kFieldMask) - ranks;
        }
      }
    }
  }
  return bad ? kFlagMalformed : 0u;
}

// The bit planes of a unit's sums, and back.
PYDIST_INLINE void planes_of(const int32_t* sums, int bits, unsigned char* planes) {
  for (int j = 0; j < bits; ++j) {
    for (int i = 0; i < kPlaneWords; ++i) {
      uint32_t word = 0;
      for (int k = 0; k < kWordBits; ++k) {
        word |= ((static_cast<uint32_t>(sums[i * kWordBits + k]) >> j) & 1u) << k;
      }
      store_word(planes + 4 * (j * kPlaneWords + i), word);
    }
  }
}

// Returns whether all are sums of so many ranks; what is not becomes zero.
PYDIST_INLINE bool sums_of(const unsigned char* planes, int bits, int32_t ranks, int32_t* sums) {
  bool good = true;
  for (int i = 0; i < kPlaneWords; ++i) {
    uint32_t fields[kWordBits] = {};
    for (int j = 0; j < bits; ++j) {
      const uint32_t word = load_word(planes + 4 * (j * kPlaneWords + i));
      for (int k = 0; k < kWordBits; ++k) fields[k] |= ((word >> k) & 1u) << j;
    }
    const uint32_t sign = 1u << (bits - 1);
    int beyond = 0;
    for (int k = 0; k < kWordBits; ++k) {
      const auto sum = static_cast<int32_t>((fields[k] ^ sign) - sign);
      const bool wrong = sum > ranks || sum < -ranks;
      beyond |= wrong ? 1 : 0;
      sums[i * kWordBits + k] = wrong ? 0 : sum;
    }
    good = good && !beyond;
  }
  return good;
}

// Calls body(unit, units, element, n) for the tiles of a row: the payload's first unit of a tile,
// how many there are, the first element within the row, and how many there are of them.
template <typename Body>
PYDIST_INLINE void for_tiles(const Row& row, const Body& body) {
  for (int64_t i = 0; i < row.n; i += kUnitsTile) {
    const int n = static_cast<int>(row.n - i < kUnitsTile ? row.n - i : kUnitsTile);
    body(row.word + i / kUnit, (n + kUnit - 1) / kUnit, i, n);
  }
}

// The values of sums, as T. Returns flags: whether one is not finite as float32.
template <typename T>
uint32_t put_values(const int32_t* sums, int n, float scaler, const TernarySource& a, bool streams,
                    T* out) {
  alignas(64) float values[kUnitsTile];
  for (int j = 0; j < n; ++j) values[j] = trit_value(scaler, sums[j], a.divisor);
  const float most = trit_value(scaler, static_cast<int32_t>(a.ranks), a.divisor);
  const bool finite = (float_bits(most) & kAbsMask) < kInfBits;  // and so are those of other sums
  narrowed(values, n, streams && finite, out);
  if (finite) return 0u;
  for (int j = 0; j < n; ++j) {
    if ((float_bits(values[j]) & kAbsMask) >= kInfBits) return kFlagNonFinite;
  }
  return 0u;
}

}  // namespace

uint32_t ternary_sum(const Row& row, const TernarySource& a, unsigned char* out) {
  const int bits = sum_bits(a.ranks);
  const int64_t size = sum_unit_bytes(a.ranks);
  uint32_t flags = 0;
  for_tiles(row, [&](int64_t unit, int units, int64_t, int) {
    alignas(64) int32_t sums[kUnitsTile];
    flags |= sum_tile(a, unit, units, sums);
    for (int u = 0; u < units; ++u) planes_of(sums + u * kUnit, bits, out + (unit + u) * size);
  });
  return flags;
}

template <typename T>
uint32_t ternary_unpack(const Row& row, const TernarySource& a, bool streams) {
  T* out = reinterpret_cast<T*>(row.x);
  const float scaler = scaler_at(row.momentum_out);
  streams = streams && can_stream(out);
  uint32_t flags = 0;
  for_tiles(row, [&](int64_t unit, int units, int64_t i, int n) {
    alignas(64) int32_t sums[kUnitsTile];
    flags |= sum_tile(a, unit, units, sums);
    flags |= put_values(sums, n, scaler, a, streams, out + i);
  });
  stream_end();
  return flags;
}

template <typename T>
uint32_t ternary_unpack_sums(const Row& row, const TernarySource& a, bool streams) {
  T* out = reinterpret_cast<T*>(row.x);
  const float scaler = scaler_at(row.momentum_out);
  streams = streams && can_stream(out);
  const int bits = sum_bits(a.ranks);
  const int64_t size = sum_unit_bytes(a.ranks);
  const auto ranks = static_cast<int32_t>(a.ranks);
  uint32_t flags = 0;
  for_tiles(row, [&](int64_t unit, int units, int64_t i, int n) {
    alignas(64) int32_t sums[kUnitsTile];
    for (int u = 0; u < units; ++u) {
      const bool good = sums_of(a.data + (unit + u) * size, bits, ranks, sums + u * kUnit);
      flags |= good ? 0u : kFlagMalformed;
    }
    flags |= put_values(sums, n, scaler, a, streams, out + i);
  });
  stream_end();
  return flags;
}

template uint32_t ternary_unpack<float>(const Row&, const TernarySource&, bool);
template uint32_t ternary_unpack<Half>(const Row&, const TernarySource&, bool);
template uint32_t ternary_unpack<BFloat>(const Row&, const TernarySource&, bool);
template uint32_t ternary_unpack_sums<float>(const Row&, const TernarySource&, bool);
template uint32_t ternary_unpack_sums<Half>(const Row&, const TernarySource&, bool);
template uint32_t ternary_unpack_sums<BFloat>(const Row&, const TernarySource&, bool);

}  // namespace pydist::cpu::PYDIST_ISA
