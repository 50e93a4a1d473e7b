// Data races: two threads, the same bytes, at least one writes, not both atomically, and no barrier
// between. Internal to the emulator.
//
// The compiler calls a hook before every load and store of kernel code (-fsanitize=thread; the
// hooks are ours, not that tool's). For every four bytes the last write and two last reads are
// remembered: who and when, on a clock that every barrier and fence moves on. Ordered are accesses
// of one thread; of one block with a block barrier between; of one warp with a __syncwarp of both
// lanes between (shuffles and votes order no memory); and of two threads that both passed a fence
// since, which is lenient: that the flag between them was read in the right order isn't checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

using Time = uint32_t;

// When the threads of a block last waited for each other.
class BlockOrder {
 public:
  void start(uint32_t block, int threads);
  void block_met();
  void warp_met(int warp, uint32_t lanes);
  void fence(int thread);

  // Whether what `other` (of this block) did at `time` is ordered before what `thread` does now.
  bool ordered(int other, Time time, int thread) const;

 private:
  std::size_t pair(int warp, int lane, int other) const {
    return static_cast<std::size_t>(warp * 32 + lane) * 32 + static_cast<std::size_t>(other);
  }

  uint32_t block_;
  Time block_met_;
  std::vector<Time> fence_;     // by thread
  std::vector<Time> warp_met_;  // by warp and two lanes
};

enum class Access : unsigned char {
  kRead,
  kWrite,
  kSyncRead,
  kSyncWrite
};  // Sync: atomic, volatile

void races_begin(uint32_t blocks);
void races_access(uintptr_t address, std::size_t size, Access access, const void* where);

}  // namespace emulation
