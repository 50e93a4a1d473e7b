// The CPU kernels of another processor, for a Python process on this one: reads requests from
// standard input, answers on standard output. The other end is remote.py.
//
// A request is an operation, the number of its arguments, and the arguments, int64 each; the bytes
// of an array follow a kPut. Each array lies between pages that may not be touched, and what is
// left of its own pages holds a pattern that must not change.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "../../csrc/cpu/driver.h"
#include "../../csrc/cpu/float_mode.h"

namespace {

using namespace pydist;

enum Operation : int64_t { kPut = 0, kGet = 1, kCall = 2, kEnd = 3 };

// ------------------------------------------------------------ messages

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "server: %s\n", why.c_str());
  std::_Exit(2);
}

// False where the input ends before the first byte.
bool read_all(void* to, size_t size) {
  size_t done = 0;
  while (done < size) {
    const ssize_t got = read(STDIN_FILENO, static_cast<char*>(to) + done, size - done);
    if (got < 0) fail("reading failed");
    if (got == 0 && done == 0) return false;
    if (got == 0) fail("a request ended early");
    done += static_cast<size_t>(got);
  }
  return true;
}

void write_all(const void* from, size_t size) {
  size_t done = 0;
  while (done < size) {
    const ssize_t put = write(STDOUT_FILENO, static_cast<const char*>(from) + done, size - done);
    if (put <= 0) fail("writing failed");
    done += static_cast<size_t>(put);
  }
}

void answer(int64_t value) { write_all(&value, sizeof(value)); }

// ------------------------------------------------------------ arrays

class Array {
 public:
  static constexpr unsigned char kPattern = 0x5A;
  static constexpr size_t kAlign = 16;  // no vector load of these kernels is wider

  // At an address that leaves `remainder` when divided by kAlign, as near as that allows to the
  // page behind: reading one vector too many ends the process.
  Array(size_t size, size_t remainder) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t room = (size + kAlign + page - 1) / page * page;
    whole_size_ = room + 2 * page;
    void* whole = mmap(nullptr, whole_size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) fail("out of memory");
    whole_ = static_cast<unsigned char*>(whole);
    if (mprotect(whole_ + page, room, PROT_READ | PROT_WRITE) != 0) fail("mprotect failed");
    first_ = whole_ + page;
    end_ = first_ + room;
    std::memset(first_, kPattern, room);
    size_t start = room - size;
    start -= (start - remainder) % kAlign;
    begin_ = first_ + start;
  }

  unsigned char* begin() const { return begin_; }

  bool intact_around() const {
    for (const unsigned char* p = first_; p < begin_; ++p) {
      if (*p != kPattern) return false;
    }
    for (const unsigned char* p = begin_ + size_; p < end_; ++p) {
      if (*p != kPattern) return false;
    }
    return true;
  }

  void release() { munmap(whole_, whole_size_); }

 private:
  size_t size_, whole_size_;
  unsigned char *whole_, *first_, *begin_, *end_;
};

// ------------------------------------------------------------ kernels

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

double as_double(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

float rounded(int64_t bits) { return cpu::round_scalar(as_double(bits)); }

// The arguments of pydist._C, in its order; those of an argument object in the object's place.
LionPackArgs lion_pack_args(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {rounded(a[0]),
          rounded(a[1]),
          rounded(a[2]),
          rounded(a[3]),
          static_cast<uint32_t>(a[4]),
          rounded(a[5]),
          static_cast<uint32_t>(a[6]),
          static_cast<uint32_t>(a[7]),
          static_cast<uint32_t>(a[8]),
          at<const int64_t>(a[9])};
}

LionApplyArgs lion_apply_args(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {rounded(a[0]), rounded(a[1]), static_cast<int>(a[2]), a[3], a[4]};
}

VoteArgs vote_args(const int64_t* a) {
  return {at<const unsigned char>(a[0]), a[1], a[2],
          at<unsigned char>(a[3]),       a[4], static_cast<Ties>(a[5]),
          static_cast<uint32_t>(a[6]),   a[7], at<const int64_t>(a[8])};
}

Unpack unpack_args(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {at<const unsigned char>(a[0]), a[1], static_cast<int>(a[2]), a[3], rounded(a[4])};
}

// Five words of a format, then the rest.
BlockFormat block_format(const int64_t* a) {
  return cpu::block_format(static_cast<int>(a[0]), static_cast<int>(a[1]), static_cast<int>(a[2]),
                           static_cast<int>(a[3]), a[4] != 0);
}

constexpr int kEncodeWords = 13;
EncodeArgs encode_args(const int64_t* a) {
  return {block_format(a),
          at<unsigned char>(a[5]),
          at<unsigned char>(a[6]),
          a[7],
          static_cast<uint32_t>(a[8]),
          static_cast<uint32_t>(a[9]),
          static_cast<uint32_t>(a[10]),
          static_cast<uint32_t>(a[11]),
          at<const int64_t>(a[12])};
}

constexpr int kDecodeWords = 10;
DecodeArgs decode_args(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {block_format(a), at<const unsigned char>(a[5]), at<const unsigned char>(a[6]), a[7], a[8],
          rounded(a[9])};
}

EliasArgs elias_args(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {block_format(a),         at<unsigned char>(a[5]), at<unsigned char>(a[6]),  a[7],
          at<unsigned char>(a[8]), at<unsigned char>(a[9]), at<unsigned char>(a[10]), a[11],
          at<int64_t>(a[12])};
}

TernaryScaleArgs ternary_scale_args(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {rounded(a[0]), at<SegmentSum>(a[1])};
}

TernaryPackArgs ternary_pack_args(const int64_t* a) {
  return {at<unsigned char>(a[0]),     a[1],
          static_cast<uint32_t>(a[2]), static_cast<uint32_t>(a[3]),
          static_cast<uint32_t>(a[4]), at<const int64_t>(a[5])};
}

constexpr int kSourceWords = 5;
TernarySource ternary_source(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {at<const unsigned char>(a[0]), a[1], a[2], a[3], rounded(a[4])};
}

void call_ternary(const std::string& kernel, const Row* rows, int64_t n, int threads,
                  const int64_t* a) {
  const auto* values = a + 1 + kSourceWords;
  if (kernel == "ternary_scale") {
    cpu::ternary_scale(rows, n, DType(a[0]), ternary_scale_args(a + 1), at<uint32_t>(a[3]),
                       threads);
  } else if (kernel == "ternary_pack") {
    cpu::ternary_pack(rows, n, DType(a[0]), ternary_pack_args(a + 1), at<uint32_t>(a[7]), threads);
  } else if (kernel == "ternary_sum") {
    cpu::ternary_sum(rows, n, ternary_source(a), at<unsigned char>(a[kSourceWords]),
                     at<uint32_t>(a[kSourceWords + 1]), threads);
  } else if (kernel == "ternary_unpack") {
    cpu::ternary_unpack(rows, n, DType(a[0]), ternary_source(a + 1), at<uint32_t>(*values),
                        threads);
  } else if (kernel == "ternary_unpack_sums") {
    cpu::ternary_unpack_sums(rows, n, DType(a[0]), ternary_source(a + 1), at<uint32_t>(*values),
                             threads);
  } else {
    fail("no kernel '" + kernel + "'");
  }
}

// Four words of a format, then the rest.
TopKFormat topk_format(const int64_t* a) {
  return {static_cast<int>(a[0]), static_cast<int>(a[1]), DType(a[2]), static_cast<uint64_t>(a[3])};
}

constexpr int kTopKEncodeWords = 9;
TopKEncode topk_encode(const int64_t* a) {
  return {topk_format(a),
          at<unsigned char>(a[4]),
          a[5],
          static_cast<uint32_t>(a[6]),
          static_cast<uint32_t>(a[7]),
          at<const int64_t>(a[8])};
}

constexpr int kTopKDecodeWords = 9;
TopKDecode topk_decode(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {topk_format(a), at<const unsigned char>(a[4]), a[5], a[6], rounded(a[7]), a[8] != 0};
}

SumArgs sum_args(const int64_t* a) {
  const cpu::DefaultFloatMode mode;
  return {at<const unsigned char>(a[0]), a[1], a[2], rounded(a[3]), nullptr};
}

void call_kernel(const std::string& kernel, const Row* rows, int64_t n, int threads,
                 const int64_t* a) {
  if (kernel == "pack_signs") {
    cpu::pack_signs(rows, n, DType(a[0]), at<unsigned char>(a[1]), static_cast<uint32_t>(a[2]),
                    at<uint32_t>(a[3]), threads);
  } else if (kernel == "lion_pack") {
    cpu::lion_pack(rows, n, DType(a[0]), DType(a[1]), at<unsigned char>(a[2]),
                   lion_pack_args(a + 3), at<uint32_t>(a[13]), threads);
  } else if (kernel == "lion_apply") {
    cpu::lion_apply(rows, n, DType(a[0]), at<unsigned char>(a[1]), lion_apply_args(a + 2), threads);
  } else if (kernel == "unpack_votes") {
    cpu::unpack_votes(rows, n, DType(a[0]), unpack_args(a + 1), threads);
  } else if (kernel == "count_votes") {
    cpu::count_votes(rows, n, vote_args(a), threads);
  } else if (kernel == "majority_vote") {
    cpu::majority_vote(rows, n, vote_args(a), threads);
  } else if (kernel == "quantize") {
    cpu::quantize(rows, n, DType(a[0]), encode_args(a + 1), at<uint32_t>(a[1 + kEncodeWords]),
                  threads);
  } else if (kernel == "quantize_feedback") {
    cpu::quantize_feedback(rows, n, DType(a[0]), DType(a[1]), encode_args(a + 2),
                           at<uint32_t>(a[2 + kEncodeWords]), threads);
  } else if (kernel == "reduce_quantized") {
    cpu::reduce_quantized(rows, n, decode_args(a), encode_args(a + kDecodeWords),
                          at<uint32_t>(a[kDecodeWords + kEncodeWords]), threads);
  } else if (kernel == "dequantize") {
    cpu::dequantize(rows, n, DType(a[0]), decode_args(a + 1), threads);
  } else if (kernel == "elias_encode") {
    cpu::elias_encode(rows, n, elias_args(a), threads);
  } else if (kernel == "elias_decode") {
    cpu::elias_decode(rows, n, elias_args(a), threads);
  } else if (kernel == "topk_select") {
    cpu::topk_select(rows, n, DType(a[0]), topk_encode(a + 1),
                     at<uint32_t>(a[1 + kTopKEncodeWords]), threads);
  } else if (kernel == "topk_feedback") {
    cpu::topk_feedback(rows, n, DType(a[0]), DType(a[1]), topk_encode(a + 2),
                       at<uint32_t>(a[2 + kTopKEncodeWords]), threads);
  } else if (kernel == "topk_reduce") {
    cpu::topk_reduce(rows, n, topk_decode(a), topk_encode(a + kTopKDecodeWords),
                     at<uint32_t>(a[kTopKDecodeWords + kTopKEncodeWords]), threads);
  } else if (kernel == "topk_scatter") {
    cpu::topk_scatter(rows, n, DType(a[0]), topk_decode(a + 1),
                      at<uint32_t>(a[1 + kTopKDecodeWords]), threads);
  } else if (kernel == "sum_values") {
    cpu::sum_values(rows, n, DType(a[0]), DType(a[1]), sum_args(a + 2), at<uint32_t>(a[6]),
                    threads);
  } else if (kernel == "crc32c") {
    const uint32_t before = static_cast<uint32_t>(a[2]);
    *at<uint32_t>(a[3]) = cpu::crc32c(at<unsigned char>(a[0]), a[1], before);
  } else if (kernel == "seal_messages") {
    cpu::seal_messages(at<unsigned char>(a[0]), a[1], a[2], a[3]);
  } else if (kernel == "first_damaged") {
    const uint32_t digest = static_cast<uint32_t>(a[4]);
    *at<int64_t>(a[5]) = cpu::first_damaged(at<unsigned char>(a[0]), a[1], a[2], a[3], digest);
  } else {
    call_ternary(kernel, rows, n, threads, a);
  }
}

// Everything that a thread's float mode can do to results: subnormals flushed, rounding toward
// zero, the default NaN, the half precision without infinities.
constexpr uint64_t kHostileFloatMode = 1u << 19 | 3u << 22 | 1u << 24 | 1u << 25 | 1u << 26;

// Arguments: isa, kernel (both as indices), rows, their number, threads, then the kernel's own.
void call(const std::vector<int64_t>& args) {
  static const std::vector<std::string> isas = cpu::supported_isas();
  static const char* const kernels[] = {
      "pack_signs",          "lion_pack",     "lion_apply",    "unpack_votes",
      "count_votes",         "majority_vote", "quantize",      "quantize_feedback",
      "reduce_quantized",    "dequantize",    "elias_encode",  "elias_decode",
      "ternary_scale",       "ternary_pack",  "ternary_sum",   "ternary_unpack",
      "ternary_unpack_sums", "topk_select",   "topk_feedback", "topk_reduce",
      "topk_scatter",        "sum_values",    "crc32c",        "seal_messages",
      "first_damaged"};
  cpu::select_isa(isas.at(static_cast<size_t>(args.at(0))));
  const std::string kernel = kernels[args.at(1)];
  cpu::set_float_mode(kHostileFloatMode);
  const uint64_t hostile = cpu::float_mode();  // without the bits this processor lacks
  if (hostile == cpu::kDefaultFloatMode) fail("the float mode can't be set");
  call_kernel(kernel, at<const Row>(args.at(2)), args.at(3), static_cast<int>(args.at(4)),
              args.data() + 5);
  if (cpu::float_mode() != hostile) fail(kernel + " left the float mode changed");
  cpu::set_float_mode(cpu::kDefaultFloatMode);
}

// ------------------------------------------------------------ requests

void greet() {
  std::string text =
      std::to_string(kWireVersion) + " " + std::to_string(kMaxRanks) + " " + cpu::current_isa();
  for (const std::string& isa : cpu::supported_isas()) text += " " + isa;
  text += "\n";
  write_all(text.data(), text.size());
}

void serve() {
  std::vector<Array> arrays;
  int64_t header[2];
  while (read_all(header, sizeof(header))) {
    std::vector<int64_t> args(static_cast<size_t>(header[1]));
    if (!read_all(args.data(), args.size() * sizeof(int64_t))) fail("a request ended early");
    switch (header[0]) {
      case kPut:  // size, remainder of the address; then the bytes
        arrays.emplace_back(static_cast<size_t>(args.at(0)), static_cast<size_t>(args.at(1)));
        read_all(arrays.back().begin(), static_cast<size_t>(args.at(0)));
        answer(reinterpret_cast<int64_t>(arrays.back().begin()));
        break;
      case kGet:  // address, size
        write_all(at<const void>(args.at(0)), static_cast<size_t>(args.at(1)));
        break;
      case kCall:
        call(args);
        answer(0);
        break;
      case kEnd: {  // how many of the arrays have been written around
        int64_t damaged = 0;
        for (Array& array : arrays) {
          damaged += array.intact_around() ? 0 : 1;
          array.release();
        }
        arrays.clear();
        answer(damaged);
        break;
      }
      default:
        fail("no operation " + std::to_string(header[0]));
    }
  }
}

}  // namespace

int main() {
  try {
    greet();
    serve();
  } catch (const std::exception& error) {
    fail(error.what());
  }
}
