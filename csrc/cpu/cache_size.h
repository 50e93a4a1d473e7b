// How much a call writes before its stores go past the caches.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <string>

namespace pydist::cpu {

// Bytes of the largest cache that Linux lists; where it lists none, those of a small server.
// (glibc's _SC_LEVEL3_CACHE_SIZE is ten times too large in a virtual machine on Zen 4.)
inline int64_t largest_cache() {
  int64_t kibibytes = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) +
                       "/size");
    int64_t size = 0;
    char unit = 0;
    if (file >> size >> unit && unit == 'K') kibibytes = std::max(kibibytes, size);
  }
  return (kibibytes ? kibibytes : 32 * 1024) * 1024;
}

// Half of that cache, for others use it too. Less is hot already, since backward has just written
// these gradients, or is read back soon. (unpack_signs on Zen 4 with 32 MiB, one buffer again and
// again, two runs: 16 MiB take 436 us through the caches and 671 us past them, 32 MiB the same, 128
// MiB 6,576 and 5,752 us.)
inline std::atomic<int64_t>& stream_limit() {
  static std::atomic<int64_t> limit{largest_cache() / 2};
  return limit;
}

}  // namespace pydist::cpu
