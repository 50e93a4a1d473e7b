// crc32c: the checksum of messages (Castagnoli's polynomial, as in iSCSI and ext4), reflected.
//
// crc(A B) = shift(crc(A), bytes of B) ^ crc(B) with crc starting from zero: so three runs are
// computed side by side, which hides the three cycles that the processor's instruction takes.
#include <array>
#include <cstring>

#include "../table.h"

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#define PYDIST_CRC_INSTRUCTION
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define PYDIST_CRC_INSTRUCTION
#endif

namespace pydist::cpu::PYDIST_ISA {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // bit 31 - i is the coefficient of x^i
using Table = std::array<uint32_t, 256>;

constexpr Table byte_table() {
  Table table = {};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
    table[i] = crc;
  }
  return table;
}

constexpr Table kByte = byte_table();

constexpr uint32_t step_byte(uint32_t crc, unsigned char byte) {
  return (crc >> 8) ^ kByte[(crc ^ byte) & 255];
}

#if defined(PYDIST_CRC_INSTRUCTION)

uint32_t step_word(uint32_t crc, const unsigned char* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
#if defined(__SSE4_2__)
  return static_cast<uint32_t>(_mm_crc32_u64(crc, word));
#else
  return __crc32cd(crc, word);
#endif
}

constexpr int64_t kRun = 1024;  // bytes of each of the three runs

// What kRun further bytes of zeros make of a checksum, which is linear: by each of its four bytes.
constexpr std::array<Table, 4> shift_tables() {
  std::array<uint32_t, 32> of_bit = {};
  for (int bit = 0; bit < 32; ++bit) {
    uint32_t crc = uint32_t{1} << bit;
    for (int64_t i = 0; i < kRun; ++i) crc = step_byte(crc, 0);
    of_bit[bit] = crc;
  }
  std::array<Table, 4> tables = {};
  for (int byte = 0; byte < 4; ++byte) {
    for (uint32_t value = 0; value < 256; ++value) {
      for (int bit = 0; bit < 8; ++bit) {
        if (value >> bit & 1) tables[byte][value] ^= of_bit[8 * byte + bit];
      }
    }
  }
  return tables;
}

constexpr std::array<Table, 4> kShift = shift_tables();

uint32_t shift(uint32_t crc) {
  return kShift[0][crc & 255] ^ kShift[1][crc >> 8 & 255] ^ kShift[2][crc >> 16 & 255] ^
         kShift[3][crc >> 24];
}

uint32_t step_bulk(uint32_t crc, const unsigned char** data, int64_t* n) {
  for (; *n >= 3 * kRun; *data += 3 * kRun, *n -= 3 * kRun) {
    const unsigned char* p = *data;
    uint32_t second = 0, third = 0;
    for (int64_t i = 0; i < kRun; i += 8) {
      crc = step_word(crc, p + i);
      second = step_word(second, p + kRun + i);
      third = step_word(third, p + 2 * kRun + i);
    }
    crc = shift(shift(crc) ^ second) ^ third;
  }
  for (; *n >= 8; *data += 8, *n -= 8) crc = step_word(crc, *data);
  return crc;
}

#else

// Eight bytes at once by eight tables: table k is what k further bytes of zeros make of a byte.
constexpr std::array<Table, 8> slice_tables() {
  std::array<Table, 8> tables = {};
  tables[0] = kByte;
  for (int k = 1; k < 8; ++k) {
    for (uint32_t i = 0; i < 256; ++i) tables[k][i] = step_byte(tables[k - 1][i], 0);
  }
  return tables;
}

constexpr std::array<Table, 8> kSlice = slice_tables();

uint32_t step_bulk(uint32_t crc, const unsigned char** data, int64_t* n) {
  for (; *n >= 8; *data += 8, *n -= 8) {
    const unsigned char* p = *data;
    uint32_t next = 0;
    for (int i = 0; i < 4; ++i) next ^= kSlice[7 - i][(crc >> 8 * i & 255) ^ p[i]];
    for (int i = 4; i < 8; ++i) next ^= kSlice[7 - i][p[i]];
    crc = next;
  }
  return crc;
}

#endif

}  // namespace

uint32_t crc32c(const unsigned char* data, int64_t n, uint32_t before) {
  uint32_t crc = step_bulk(~before, &data, &n);
  for (; n > 0; ++data, --n) crc = step_byte(crc, *data);
  return ~crc;
}

}  // namespace pydist::cpu::PYDIST_ISA
