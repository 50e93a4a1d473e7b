// Random numbers that a seed repeats.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace emulation {

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed; }

  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }

  template <typename T>
  void shuffle(T* items, int n) {
    for (int i = n - 1; i > 0; --i) std::swap(items[i], items[below(static_cast<uint32_t>(i) + 1)]);
  }

 private:
  uint64_t state_ = 0;
};

}  // namespace emulation
