// Where shared memory lies. Internal to the emulator.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

// Shared memory of a block behind or before a page that nobody may touch.
class DynamicShared {
 public:
  DynamicShared() = default;
  ~DynamicShared();
  DynamicShared(const DynamicShared&) = delete;
  DynamicShared& operator=(const DynamicShared&) = delete;
  void reserve(std::size_t bytes, bool guard_behind);
  unsigned char* begin() const { return begin_; }
  std::size_t size() const { return size_; }
  bool guards(uintptr_t address) const;

 private:
  unsigned char* memory_ = nullptr;
  std::size_t mapped_ = 0, size_ = 0;
  unsigned char* begin_ = nullptr;
};

// The static shared variables of all kernels, of the calling thread.
struct Range {
  uintptr_t begin, size;
  bool holds(uintptr_t address) const { return address - begin < size; }
};
Range static_shared();

}  // namespace emulation
