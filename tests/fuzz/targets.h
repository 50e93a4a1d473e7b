// What is fuzzed: decoders that take bytes from other ranks. To add one, write its run() (and
// make(), where random bytes would hardly ever get past its first check) in targets.cpp, and a line
// in kTargets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace fuzz {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

// Memory of exactly this size: AddressSanitizer knows the first byte behind it.
class Exact {
 public:
  explicit Exact(size_t size) : size_(size), bytes_(new uint8_t[size ? size : 1]) {
    if (size == 0) bytes_.reset(new uint8_t[1]);
    std::memset(bytes_.get(), 0xA5, size);
  }
  uint8_t* data() { return bytes_.get(); }
  size_t size() const { return size_; }
  template <typename T>
  T* at(size_t offset = 0) {
    return reinterpret_cast<T*>(bytes_.get() + offset);
  }

 private:
  size_t size_;
  std::unique_ptr<uint8_t[]> bytes_;
};

// Takes an input apart: numbers first, then the bytes of a payload.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint32_t number(uint32_t below) {  // 0 ... below - 1
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) value |= static_cast<uint32_t>(byte()) << (8 * i);
    return value % below;
  }
  size_t left() const { return left_; }
  // The next bytes; zeros where there are no more.
  void fill(uint8_t* to, size_t size) {
    for (size_t i = 0; i < size; ++i) to[i] = byte();
  }

 private:
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  const uint8_t* data_;
  size_t left_;
};

struct Target {
  const char* name;
  bool (*run)(Input& input);      // whether the bytes were taken for well-formed
  Bytes (*make)(Random& random);  // an input that is
};

extern const Target kTargets[];
extern const size_t kTargetCount;

}  // namespace fuzz
