// The decoders, called as the checks of pydist's doors allow: what is left open are the bytes.
#include "targets.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/driver.h"

namespace fuzz {
namespace {

using namespace pydist;

constexpr int64_t kDTypeBytes[] = {4, 2, 2};

void append(Bytes& bytes, uint32_t number) {
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<uint8_t>(number >> (8 * i)));
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

Bytes random_bytes(Random& random) {
  Bytes bytes(random() % 600);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

Row row_of(const void* x, int64_t n) {
  Row row = {};
  row.x = reinterpret_cast<int64_t>(x);
  row.n = n;
  return row;
}

// ------------------------------------------------------------ Elias codes

constexpr int kEliasBlocks[] = {32, 64, 96, 512, 1024, 65536};

// Numbers of an input: bits, block, two lengths (segments), words more or fewer than the bytes say.
struct EliasShape {
  BlockFormat format;
  Row rows[2];
  int64_t blocks, code_bytes, longest;

  EliasShape(int bits, int block, int64_t first, int64_t second)
      : format(cpu::block_format(1, bits, block, 0, true)), rows{}, blocks(0) {
    const int64_t lengths[] = {first, second};
    longest = 0;
    for (int r = 0; r < 2; ++r) {
      rows[r].n = lengths[r];
      rows[r].word = rows[r].words_before = blocks;
      const int64_t count = (lengths[r] + block - 1) / block;
      for (int64_t k = 0; k < count; ++k) {
        longest += stream_limit(format, std::min<int64_t>(block, lengths[r] - k * block));
      }
      blocks += count;
    }
    const int64_t before = (first + block - 1) / block;
    code_bytes = second ? before * block_bytes(format) + pydist::code_bytes(format, second)
                        : pydist::code_bytes(format, first);
    longest = (longest + 3) / 4 * 4;
  }
  EliasArgs args(Exact& fixed, Exact& coded, int64_t* result) const {
    uint8_t* const ends = coded.data();
    return {format,
            fixed.data(),
            fixed.data() + code_bytes,
            code_bytes,
            ends,
            ends + 4 * blocks,
            ends + 8 * blocks,
            static_cast<int64_t>(coded.size()) - 8 * blocks,
            result};
  }
  size_t fixed_bytes() const { return static_cast<size_t>(code_bytes + 4 * blocks); }
};

EliasShape elias_shape(uint32_t bits, uint32_t block, uint32_t first, uint32_t second) {
  return {static_cast<int>(2 + bits % 7), kEliasBlocks[block % 6], first % 700, second % 200};
}

bool run_elias(Input& input) {
  const uint32_t bits = input.number(7), block = input.number(6);
  const uint32_t first = input.number(700), second = input.number(200);
  const EliasShape shape = elias_shape(bits, block, first, second);
  const size_t head = static_cast<size_t>(8 * shape.blocks);
  const size_t most = head + static_cast<size_t>(shape.longest);
  Exact coded(std::max(head, std::min(most, input.left() / 4 * 4)));
  Exact fixed(shape.fixed_bytes());
  input.fill(coded.data(), coded.size());
  int64_t result = kNoFault;
  cpu::elias_decode(shape.rows, 2, shape.args(fixed, coded, &result), 1);
  if (result != kNoFault) {
    if (result / 16 >= shape.blocks || result % 16 > kBadScale) fail("a fault of no block");
    return false;
  }
  // What was decoded can be encoded, and decodes to the same.
  Exact again(most), back(shape.fixed_bytes());
  int64_t bytes = 0;
  cpu::elias_encode(shape.rows, 2, shape.args(fixed, again, &bytes), 1);
  Exact sent(head + static_cast<size_t>((bytes + 3) / 4 * 4));
  std::memcpy(sent.data(), again.data(), sent.size());
  result = kNoFault;
  cpu::elias_decode(shape.rows, 2, shape.args(back, sent, &result), 1);
  if (result != kNoFault) fail("the encoder's bytes are malformed");
  if (std::memcmp(fixed.data(), back.data(), fixed.size()) != 0) fail("decoded to other codes");
  return true;
}

Bytes make_elias(Random& random) {
  const uint32_t numbers[] = {static_cast<uint32_t>(random() % 7),
                              static_cast<uint32_t>(random() % 6),
                              static_cast<uint32_t>(random() % 700),
                              static_cast<uint32_t>(random() % 3 ? 0 : random() % 200)};
  const EliasShape shape = elias_shape(numbers[0], numbers[1], numbers[2], numbers[3]);
  Exact fixed(shape.fixed_bytes());
  Exact coded(static_cast<size_t>(8 * shape.blocks + shape.longest));
  std::vector<float> x(numbers[2] + numbers[3]);
  const bool sparse = random() % 2, flat = random() % 8 == 0;
  for (float& value : x) {
    const float size = static_cast<float>(random() % 1000) / 1000.0f;
    value = flat ? 1.0f : sparse && random() % 8 ? 0.0f : random() % 2 ? size : -size;
  }
  Row rows[] = {shape.rows[0], shape.rows[1]};
  rows[0].x = reinterpret_cast<int64_t>(x.data());
  rows[1].x = reinterpret_cast<int64_t>(x.data() + numbers[2]);
  EncodeArgs to = {};
  to.format = shape.format;
  to.codes = fixed.data();
  to.scales = fixed.data() + shape.code_bytes;
  to.code_bytes = shape.code_bytes;
  to.seed = static_cast<uint32_t>(random());
  if (!x.empty() && random() % 16 == 0) x[random() % x.size()] = NAN;
  cpu::quantize(rows, 2, DType::kFloat32, to, nullptr, 1);
  int64_t bytes = 0;
  cpu::elias_encode(shape.rows, 2, shape.args(fixed, coded, &bytes), 1);
  Bytes input;
  for (const uint32_t number : numbers) append(input, number);
  const int64_t size = 8 * shape.blocks + (bytes + 3) / 4 * 4;
  input.insert(input.end(), coded.data(), coded.data() + size);
  return input;
}

// ------------------------------------------------------------ payloads of a fixed length

// scheme, bits, norm
constexpr int kFormats[][3] = {{0, 1, 1}, {1, 2, 0}, {1, 3, 2}, {1, 4, 0}, {1, 5, 0},
                               {1, 6, 2}, {1, 7, 0}, {1, 8, 0}, {2, 8, 0}, {3, 8, 0}};

// The sum of what one to three ranks sent, as values, and quantized again. Any bytes are a payload.
bool run_blocks(Input& input) {
  const int* f = kFormats[input.number(10)];
  const int block = 32 * static_cast<int>(1 + input.number(40));
  const auto n = static_cast<int64_t>(input.number(2500));
  const auto ranks = static_cast<int64_t>(1 + input.number(3));
  const auto dtype = static_cast<int>(input.number(3));
  const bool stochastic = f[0] == 1 && input.number(2);
  const BlockFormat format = cpu::block_format(f[0], f[1], block, f[2], stochastic);
  const int64_t blocks = (n + block - 1) / block, codes = code_bytes(format, n);
  const int64_t stride = codes + 4 * blocks;
  Exact payloads(static_cast<size_t>(ranks * stride));
  input.fill(payloads.data(), payloads.size());
  const DecodeArgs from = {format, payloads.data(), payloads.data() + codes, stride, ranks, 1.0f};
  Exact values(static_cast<size_t>(n * kDTypeBytes[dtype]));
  const Row row = row_of(values.data(), n);
  cpu::dequantize(&row, 1, static_cast<DType>(dtype), from, 1);
  Exact reduced(static_cast<size_t>(stride));
  EncodeArgs to = {};
  to.format = format;
  to.codes = reduced.data();
  to.scales = reduced.data() + codes;
  to.code_bytes = codes;
  uint32_t flags = 0;
  const Row plain = row_of(nullptr, n);
  cpu::reduce_quantized(&plain, 1, from, to, &flags, 1);
  return true;
}

// Votes of one to nine ranks: counted, decided, turned into values.
bool run_votes(Input& input) {
  const auto n = static_cast<int64_t>(input.number(3000));
  const auto ranks = static_cast<int64_t>(1 + input.number(9));
  const auto ties = static_cast<int>(input.number(3));
  const auto dtype = static_cast<int>(input.number(3));
  const int64_t size = 4 * words_for(n);
  const int planes = planes_for(ranks), decided = ties == 1 ? 2 : 1;
  Exact payloads(static_cast<size_t>(ranks * size));
  Exact counts(static_cast<size_t>(planes * size)), sides(static_cast<size_t>(decided * size));
  Exact values(static_cast<size_t>(n * kDTypeBytes[dtype]));
  input.fill(payloads.data(), payloads.size());
  const Row row = row_of(values.data(), n);
  VoteArgs args = {payloads.data(),         size, ranks, counts.data(), size,
                   static_cast<Ties>(ties), 1,    7,     nullptr};
  cpu::count_votes(&row, 1, args, 1);
  args.out = sides.data();
  cpu::majority_vote(&row, 1, args, 1);
  cpu::unpack_votes(&row, 1, static_cast<DType>(dtype), {counts.data(), size, planes, ranks, 1}, 1);
  cpu::unpack_votes(&row, 1, static_cast<DType>(dtype), {sides.data(), size, decided, 0, 1}, 1);
  return true;
}

// Plain values of one to three ranks.
bool run_values(Input& input) {
  const auto n = static_cast<int64_t>(input.number(2000));
  const auto ranks = static_cast<int64_t>(1 + input.number(3));
  const auto from = static_cast<int>(input.number(3)), to = static_cast<int>(input.number(3));
  const int64_t stride = n * kDTypeBytes[from];
  Exact sent(static_cast<size_t>(ranks * stride));
  Exact values(static_cast<size_t>(n * kDTypeBytes[to]));
  input.fill(sent.data(), sent.size());
  const Row row = row_of(values.data(), n);
  uint32_t flags = 0;
  cpu::sum_values(&row, 1, static_cast<DType>(from), static_cast<DType>(to),
                  {sent.data(), stride, ranks, 1.0f}, &flags, 1);
  return true;
}

// ------------------------------------------------------------ top-k blocks

constexpr uint64_t kDensityOne = uint64_t{1} << 32;
constexpr int kTopKBlocks[] = {32, 64, 512, 1056, 4096};

// Numbers of an input: block, type of the values, density, length, ranks, type of the result.
struct TopKShape {
  TopKFormat format;
  int64_t n, bytes;  // elements; bytes of one payload

  TopKShape(uint32_t block, uint32_t values, uint32_t density, uint32_t length)
      : format{kTopKBlocks[block % 5], 0, static_cast<DType>(values % 3),
               std::max<uint64_t>(kDensityOne * (density % 1001) / 1000, 1)},
        n(length % 9000) {
    const int k = topk_entries(format, format.block);
    format.low_bits = kBitmap;
    if (4 * k <= format.block) {  // floor(log2(block / k)), as pydist/formats/topk.py has it
      for (int share = format.block / k; share; share /= 2) ++format.low_bits;
    }
    bytes = n / format.block * topk_block_bytes(format);
    if (n % format.block) {
      bytes += int64_t{4} * topk_layout(format, static_cast<int>(n % format.block)).words;
    }
  }
};

bool run_topk(Input& input) {
  const uint32_t block = input.number(5), values = input.number(3), density = input.number(1001);
  const TopKShape shape(block, values, density, input.number(9000));
  const auto ranks = static_cast<int64_t>(1 + input.number(3));
  const auto dtype = static_cast<int>(input.number(3));
  Exact payloads(static_cast<size_t>(ranks * shape.bytes));
  Exact result(static_cast<size_t>(shape.n * kDTypeBytes[dtype]));
  Exact reduced(static_cast<size_t>(shape.bytes));
  input.fill(payloads.data(), payloads.size());
  const TopKDecode from = {shape.format, payloads.data(), shape.bytes, ranks, 1.0f, false};
  const Row row = row_of(result.data(), shape.n), plain = row_of(nullptr, shape.n);
  uint32_t flags = 0, again = 0, cleared = 0;
  cpu::topk_scatter(&row, 1, static_cast<DType>(dtype), from, &flags, 1);
  TopKDecode clear = from;
  clear.ranks = 1;
  clear.clear = true;
  cpu::topk_scatter(&row, 1, static_cast<DType>(dtype), clear, &cleared, 1);
  const TopKEncode to = {shape.format, reduced.data(), shape.bytes, 1, 2, nullptr};
  cpu::topk_reduce(&plain, 1, from, to, &again, 1);
  if ((flags ^ again) & kFlagMalformed) fail("one decoder refuses what the other takes");
  // Whatever was sent, what is sent on is well-formed.
  const TopKDecode sent = {shape.format, reduced.data(), shape.bytes, 1, 1.0f, false};
  uint32_t wrong = 0;
  cpu::topk_scatter(&row, 1, static_cast<DType>(dtype), sent, &wrong, 1);
  if (wrong & kFlagMalformed) fail("the encoder's bytes are malformed");
  return !(flags & kFlagMalformed);
}

Bytes make_topk(Random& random) {
  uint32_t numbers[6];
  for (uint32_t& number : numbers) number = static_cast<uint32_t>(random());
  numbers[2] = random() % 2 ? numbers[2] % 1001 : numbers[2] % 50;
  numbers[3] = random() % 2 ? numbers[3] % 9000 : numbers[3] % 100;
  const TopKShape shape(numbers[0] % 5, numbers[1] % 3, numbers[2], numbers[3]);
  const uint32_t ranks = 1 + numbers[4] % 3;
  Bytes input;
  for (const uint32_t number : numbers) append(input, number);
  std::vector<float> x(static_cast<size_t>(shape.n));
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    const bool constant = random() % 8 == 0;
    for (float& value : x) {
      value = constant ? 1.0f : static_cast<float>(static_cast<int64_t>(random() % 2001) - 1000);
    }
    Exact payload(static_cast<size_t>(shape.bytes));
    const TopKEncode to = {shape.format, payload.data(), shape.bytes, rank, 0, nullptr};
    const Row row = row_of(x.data(), shape.n);
    cpu::topk_select(&row, 1, DType::kFloat32, to, nullptr, 1);
    input.insert(input.end(), payload.data(), payload.data() + shape.bytes);
  }
  return input;
}

// ------------------------------------------------------------ trits

constexpr int64_t kTrits = 160;  // elements of a unit

// Trits of one to nine ranks: added up, turned into values; then any bytes as sums.
bool run_trits(Input& input) {
  const auto n = static_cast<int64_t>(input.number(3000));
  const auto ranks = static_cast<int64_t>(1 + input.number(9));
  const auto dtype = static_cast<int>(input.number(3));
  const int64_t rest = n % kTrits, units = (n + kTrits - 1) / kTrits;
  const int64_t size = n / kTrits * 32 + std::min<int64_t>((rest + 3) / 4 * 4, 32);
  Exact payloads(static_cast<size_t>(ranks * size));
  Exact sums(static_cast<size_t>(units * sum_unit_bytes(ranks)));
  Exact values(static_cast<size_t>(n * kDTypeBytes[dtype])), scaler(sizeof(float));
  input.fill(payloads.data(), payloads.size());
  input.fill(scaler.data(), scaler.size());
  Row row = row_of(values.data(), n);
  row.momentum = row.momentum_out = reinterpret_cast<int64_t>(scaler.data());
  const TernarySource from = {payloads.data(), size, size, ranks, 1.0f};
  uint32_t flags = 0, again = 0, wrong = 0;
  cpu::ternary_sum(&row, 1, from, sums.data(), &flags, 1);
  cpu::ternary_unpack(&row, 1, static_cast<DType>(dtype), from, &again, 1);
  if ((flags ^ again) & kFlagMalformed) fail("one decoder refuses what the other takes");
  const auto all = static_cast<int64_t>(sums.size());
  const TernarySource reduced = {sums.data(), all, all, ranks, 1.0f};
  cpu::ternary_unpack_sums(&row, 1, static_cast<DType>(dtype), reduced, &wrong, 1);
  if (wrong & kFlagMalformed) fail("the encoder's sums are malformed");
  input.fill(sums.data(), sums.size());
  cpu::ternary_unpack_sums(&row, 1, static_cast<DType>(dtype), reduced, &flags, 1);
  return !(flags & kFlagMalformed);
}

// The numbers, then bytes that are trits; what is missing is zero, and zeros are sums.
Bytes make_trits(Random& random) {
  Bytes input;
  for (int i = 0; i < 3; ++i) append(input, static_cast<uint32_t>(random()));
  const size_t size = random() % 2000;
  for (size_t i = 0; i < size; ++i) input.push_back(static_cast<uint8_t>(random() % 243));
  return input;
}

}  // namespace

const Target kTargets[] = {
    {"elias", run_elias, make_elias},   {"blocks", run_blocks, random_bytes},
    {"votes", run_votes, random_bytes}, {"values", run_values, random_bytes},
    {"topk", run_topk, make_topk},      {"trits", run_trits, make_trits},
};
const size_t kTargetCount = sizeof(kTargets) / sizeof(kTargets[0]);

}  // namespace fuzz
