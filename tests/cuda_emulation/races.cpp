#include "races.h"

#include <array>
#include <cstdio>
#include <memory>
#include <unordered_map>

#include "faults.h"
#include "report.h"

namespace emulation {
namespace {

// An access to some bytes (a bit each) of a granule of four.
struct Record {
  uint32_t block;
  uint16_t thread;
  uint8_t bytes;
  bool sync;
  Time time;
};

struct Granule {
  Record write, read, read_before;  // the two reads are of different threads
};

constexpr std::size_t kGranuleBytes = 4;
constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kMostPages = 16384;
using Page = std::array<Granule, kPageBytes / kGranuleBytes>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::array<std::pair<uintptr_t, Page*>, 256> recent;  // a cache of `pages`

Time now = 1, launched = 1;
std::vector<Time> block_fence;  // by block: the last fence of any of its threads

Granule& granule_of(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  auto& cached = recent[number % recent.size()];
  if (cached.first != number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    cached = {number, page.get()};
  }
  return (*cached.second)[address % kPageBytes / kGranuleBytes];
}

bool in_dynamic_shared(uintptr_t address) {
  const DynamicShared& shared = current_block->dynamic_shared;
  return address - reinterpret_cast<uintptr_t>(shared.begin()) < shared.size();
}

bool ignored(uintptr_t address) {
  const auto in = [&](const auto& variable) {
    return address - reinterpret_cast<uintptr_t>(&variable) < sizeof variable;
  };
  return current->fiber->on_stack(address) || in(threadIdx) || in(blockIdx) || in(blockDim) ||
         in(gridDim);
}

struct Attempt {
  uintptr_t address;
  std::size_t size;
  Access access;
  const void* where;
  bool shared;  // memory of the block alone, at an address that other blocks have too

  bool writes() const { return access == Access::kWrite || access == Access::kSyncWrite; }
  bool sync() const { return access == Access::kSyncRead || access == Access::kSyncWrite; }
};

bool ordered(const Record& before, const Attempt& attempt) {
  if (before.time < launched) return true;
  const uint32_t block = current_block->number;
  if (before.block == block) {
    return current_block->order.ordered(before.thread, before.time, current->id);
  }
  return attempt.shared ||
         (block_fence[before.block] > before.time && block_fence[block] > before.time);
}

std::string place_of(uintptr_t address) {
  if (in_dynamic_shared(address)) {
    const auto begin = reinterpret_cast<uintptr_t>(current_block->dynamic_shared.begin());
    return "dynamic shared memory + " + std::to_string(address - begin);
  }
  if (static_shared().holds(address)) return "static shared memory";
  char text[24];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<std::size_t>(address));
  return text;
}

[[noreturn]] void report(const Attempt& attempt, const Record& before, const char* did) {
  std::string other = "thread " + std::to_string(before.thread);
  if (before.block != current_block->number) other += " of block " + std::to_string(before.block);
  fail_at(std::string("data race: ") + (attempt.writes() ? "a write" : "a read") + " of " +
              std::to_string(attempt.size) + " bytes at " + place_of(attempt.address) + ", which " +
              other + " " + did + " with no barrier between",
          attempt.where);
}

void check(const Attempt& attempt, uint8_t bytes, const Record& before, const char* did) {
  if (!(before.bytes & bytes) || (before.sync && attempt.sync())) return;
  if (!ordered(before, attempt)) report(attempt, before, did);
}

void visit(const Attempt& attempt, Granule& granule, uint8_t bytes) {
  check(attempt, bytes, granule.write, "wrote");
  const Record record = {current_block->number, static_cast<uint16_t>(current->id), bytes,
                         attempt.sync(), now};
  if (attempt.writes()) {
    check(attempt, bytes, granule.read, "read");
    check(attempt, bytes, granule.read_before, "read");
    granule.write = record;
  } else {
    if (granule.read.thread != record.thread || granule.read.block != record.block) {
      granule.read_before = granule.read;
    }
    granule.read = record;
  }
}

constexpr uint64_t kEndless = uint64_t{1} << 30;

// On a device another thread may come between any two accesses. One that spins on a volatile must
// let others go on even where nothing is permuted.
void overtaken(bool sync) {
  if (options.seed ? rng.one_in(16) : sync && rng.one_in(16)) step_aside(sync);
}

}  // namespace

void BlockOrder::start(uint32_t block, int threads) {
  block_ = block;
  block_met_ = 0;
  const auto count = static_cast<std::size_t>(threads);
  fence_.assign(count, 0);
  warp_met_.assign((count + 31) / 32 * 32 * 32, 0);
}

void BlockOrder::block_met() { block_met_ = ++now; }

void BlockOrder::warp_met(int warp, uint32_t lanes) {
  ++now;
  for (uint32_t left = lanes; left; left &= left - 1) {
    for (uint32_t others = lanes; others; others &= others - 1) {
      warp_met_[pair(warp, __builtin_ctz(left), __builtin_ctz(others))] = now;
    }
  }
}

void BlockOrder::fence(int thread) {
  fence_[static_cast<std::size_t>(thread)] = block_fence[block_] = ++now;
}

bool BlockOrder::ordered(int other, Time time, int thread) const {
  if (other == thread || block_met_ > time) return true;
  if (fence_[static_cast<std::size_t>(other)] > time &&
      fence_[static_cast<std::size_t>(thread)] > time) {
    return true;
  }
  return other / 32 == thread / 32 && warp_met_[pair(thread / 32, thread % 32, other % 32)] > time;
}

void races_begin(uint32_t blocks) {
  launched = ++now;
  if (now > 0xF0000000u || pages.size() > kMostPages) {
    pages.clear();
    recent = {};
  }
  if (now > 0xF0000000u) now = launched = 1;
  block_fence.assign(blocks, 0);
}

void races_access(uintptr_t address, std::size_t size, Access access, const void* where) {
  if (!current || ignored(address)) return;
  overtaken(access == Access::kSyncRead || access == Access::kSyncWrite);
  if (++counters.accesses - accesses_at_progress > kEndless) fail_at("endless loop", where);
  if (!options.races) return;
  const Attempt attempt = {address, size, access, where,
                           in_dynamic_shared(address) || static_shared().holds(address)};
  const uintptr_t end = address + size;
  for (uintptr_t at = address / kGranuleBytes * kGranuleBytes; at < end; at += kGranuleBytes) {
    uint8_t bytes = 0xF;
    if (at < address) bytes &= static_cast<uint8_t>(0xF << (address - at));
    if (at + kGranuleBytes > end) bytes &= static_cast<uint8_t>(0xF >> (at + kGranuleBytes - end));
    visit(attempt, granule_of(at), bytes);
  }
}

}  // namespace emulation

// ------------------------------------------------------------ what the compiler calls

namespace {

void seen(const void* address, std::size_t size, emulation::Access access, const void* where) {
  emulation::races_access(reinterpret_cast<uintptr_t>(address), size, access, where);
}

}  // namespace

#define EMULATION_HOOK(name, size, access)                                       \
  __attribute__((visibility("hidden"))) void __tsan_##name(void* address) {      \
    seen(address, size, emulation::Access::access, __builtin_return_address(0)); \
  }
#define EMULATION_HOOKS(size)                                    \
  EMULATION_HOOK(read##size, size, kRead)                        \
  EMULATION_HOOK(write##size, size, kWrite)                      \
  EMULATION_HOOK(unaligned_read##size, size, kRead)              \
  EMULATION_HOOK(unaligned_write##size, size, kWrite)            \
  EMULATION_HOOK(volatile_read##size, size, kSyncRead)           \
  EMULATION_HOOK(volatile_write##size, size, kSyncWrite)         \
  EMULATION_HOOK(unaligned_volatile_read##size, size, kSyncRead) \
  EMULATION_HOOK(unaligned_volatile_write##size, size, kSyncWrite)

extern "C" {
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)
__attribute__((visibility("hidden"))) void __tsan_read_range(void* address, std::size_t size) {
  seen(address, size, emulation::Access::kRead, __builtin_return_address(0));
}
__attribute__((visibility("hidden"))) void __tsan_write_range(void* address, std::size_t size) {
  seen(address, size, emulation::Access::kWrite, __builtin_return_address(0));
}
__attribute__((visibility("hidden"))) void __tsan_init() {}
__attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
__attribute__((visibility("hidden"))) void __tsan_func_exit(void*) {}
__attribute__((visibility("hidden"))) void __tsan_vptr_update(void**, void*) {}
}
