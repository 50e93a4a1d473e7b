#include "scheduler.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

#include "faults.h"
#include "races.h"
#include "report.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

Options options;
Counters counters;
Random rng;
Thread* current;
Block* current_block;
uint64_t accesses_at_progress;

namespace {

constexpr int kMostResident = 3, kMostWarps = 32;
constexpr uint64_t kIdleYields = 2'000'000;

const Launch* running;
uint64_t idle_yields;
Block pool[kMostResident];
thread_local char shared_anchor;  // some place within the segment of static shared variables

void progress() {
  idle_yields = 0;
  accesses_at_progress = counters.accesses;
}

bool permuted() { return options.seed != 0; }

bool same_call(const Site& a, const Site& b) {
  return a.line == b.line && !std::strcmp(a.function, b.function) && !std::strcmp(a.file, b.file);
}

// ------------------------------------------------------------ shared memory

std::size_t page() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Never the same twice, so that a kernel that reads what it did not write differs from run to run.
void poison(unsigned char* at, std::size_t bytes) {
  const uint64_t pattern = rng.next();
  for (std::size_t i = 0; i < bytes; i += sizeof pattern) {
    std::memcpy(at + i, &pattern, std::min(sizeof pattern, bytes - i));
  }
}

// Gives a block its shared memory; static variables have one address, so blocks swap their values.
void enter(Block& block) {
  const Range shared = static_shared();
  auto* variables = reinterpret_cast<unsigned char*>(shared.begin);
  if (current_block != &block) {
    if (current_block) current_block->static_shared.assign(variables, variables + shared.size);
    if (block.poisoned && !block.static_shared.empty()) {
      std::memcpy(variables, block.static_shared.data(), shared.size);
    }
  }
  if (!block.poisoned) {
    poison(variables, shared.size);
    block.dynamic_shared.reserve(running->config->dynamicSmemBytes, !rng.one_in(2));
    poison(block.dynamic_shared.begin(), block.dynamic_shared.size());
    block.poisoned = true;
  }
  current_block = &block;
  blockIdx = block.index;
}

// ------------------------------------------------------------ threads

void entry() {
  for (;;) {
    running->invoke(running->kernel, running->arguments);
    Thread& thread = *current;
    Block& block = *current_block;
    thread.state = State::kDone;
    block.warp[thread.warp()].stopped |= 1u << thread.lane();
    ++block.done;
    progress();
    thread.fiber->leave();
  }
}

void wait() { current->fiber->leave(); }

void start_block(Block& block, uint32_t number) {
  const dim3 grid = gridDim, size = blockDim;
  block.number = number;
  block.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block.threads = static_cast<int>(size.x * size.y * size.z);
  block.at_barrier = block.done = 0;
  block.poisoned = false;
  block.thread.resize(std::max<std::size_t>(block.thread.size(), block.threads));
  for (int id = 0; id < block.threads; ++id) {
    Thread& thread = block.thread[id];
    const auto u = static_cast<unsigned>(id);
    thread.id = id;
    thread.index = {u % size.x, u / size.x % size.y, u / size.x / size.y};
    thread.state = State::kReady;
    if (!thread.fiber) thread.fiber = std::make_unique<Fiber>();
    if (!thread.fiber->started()) thread.fiber->start(entry);
  }
  block.warp.assign(block.warps(), Warp{});
  if (const int rest = block.threads % kWarpSize) {
    block.warp.back().missing = block.warp.back().stopped = ~0u << rest;
  }
  block.order.start(number, block.threads);
  ++counters.blocks;
  counters.threads += static_cast<uint64_t>(block.threads);
}

void run_warp(Block& block, int warp) {
  const int first = warp * kWarpSize;
  const int lanes = std::min(kWarpSize, block.threads - first);
  int order[kWarpSize];
  std::iota(order, order + lanes, 0);
  if (permuted()) rng.shuffle(order, lanes);
  for (int i = 0; i < lanes; ++i) {
    Thread& thread = block.thread[first + order[i]];
    if (thread.state != State::kReady) continue;
    current = &thread;
    threadIdx = thread.index;
    thread.fiber->resume();
    current = nullptr;
    if (failed()) return;
  }
}

// Runs every thread that can run up to the next place where it waits.
void run_once(Block& block) {
  int order[kMostWarps];
  std::iota(order, order + block.warps(), 0);
  if (permuted()) rng.shuffle(order, block.warps());
  for (int i = 0; i < block.warps(); ++i) {
    const int warp = order[i];
    if (!block.warp[warp].ready()) continue;
    if (permuted() && rng.one_in(4)) continue;  // some warps run ahead
    run_warp(block, warp);
    if (failed()) return;
  }
}

bool any_ready(const Block& block) {
  return std::any_of(block.warp.begin(), block.warp.end(),
                     [](const Warp& warp) { return warp.ready() != 0; });
}

// ------------------------------------------------------------ meetings

uint64_t shuffled(const Block& block, const Thread& to) {
  const uint32_t bit = 1u << (to.source & (kWarpSize - 1));
  if (to.source < 0 || to.source >= kWarpSize || !(to.mask & bit)) return rng.next();
  return block.thread[to.warp() * kWarpSize + to.source].value;
}

uint64_t reduced(Exchange exchange, uint64_t a, uint64_t b) {
  const auto x = static_cast<int32_t>(a), y = static_cast<int32_t>(b);
  switch (exchange) {
    case Exchange::kAddU32:
      return static_cast<uint32_t>(a + b);
    case Exchange::kMinU32:
      return std::min(a, b);
    case Exchange::kMaxU32:
      return std::max(a, b);
    case Exchange::kMinS32:
      return static_cast<uint32_t>(std::min(x, y));
    case Exchange::kMaxS32:
      return static_cast<uint32_t>(std::max(x, y));
    case Exchange::kAnd:
      return a & b;
    case Exchange::kOr:
      return a | b;
    default:
      return a ^ b;
  }
}

// All lanes are there: what each gets.
void exchange_values(Block& block, int warp, uint32_t mask) {
  Thread* const lanes = &block.thread[warp * kWarpSize];
  const auto each = [&](const auto& body) {
    for (uint32_t left = mask; left; left &= left - 1) body(__builtin_ctz(left));
  };
  const int first = __builtin_ctz(mask);
  const Exchange exchange = lanes[first].exchange;
  uint64_t all = 0;
  switch (exchange) {
    case Exchange::kNothing:
      break;
    case Exchange::kBallot:
      each([&](int i) { all |= lanes[i].value ? uint64_t{1} << i : 0; });
      break;
    case Exchange::kShuffle:
      return each([&](int i) { lanes[i].result = shuffled(block, lanes[i]); });
    case Exchange::kMatchAny:
      return each([&](int i) {
        lanes[i].result = 0;
        each([&](int j) {
          if (lanes[j].value == lanes[i].value) lanes[i].result |= uint64_t{1} << j;
        });
      });
    case Exchange::kMatchAll:
      all = mask;
      each([&](int i) { all = lanes[i].value == lanes[first].value ? all : 0; });
      break;
    default:
      all = lanes[first].value;
      each([&](int i) { all = i == first ? all : reduced(exchange, all, lanes[i].value); });
  }
  each([&](int i) { lanes[i].result = all; });
}

// Ends the launch if the lanes that this one wants to meet can't come.
void check_meeting(const Block& block, const Thread& thread) {
  const Warp& warp = block.warp[thread.warp()];
  const uint32_t bit = 1u << thread.lane();
  const void* where = __builtin_return_address(0);
  if (!(thread.mask & bit)) {
    fail_at(call_name(thread) + " lacks the bit of lane " + std::to_string(thread.lane()) +
                ", which calls it",
            where);
  }
  const uint32_t gone = thread.mask & warp.stopped & ~warp.missing;
  if (gone) fail_at(divergence(block, thread, __builtin_ctz(gone)), where);
  for (uint32_t left = warp.waiting & thread.mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const Thread& other = block.thread[thread.warp() * kWarpSize + lane];
    if (!(other.mask & bit)) continue;  // it meets others first
    if (other.mask == thread.mask && same_call(other.site, thread.site)) continue;
    fail_at(divergence(block, thread, lane), where);
  }
}

}  // namespace

uint64_t meet_warp(Exchange exchange, uint32_t mask, uint64_t value, int source, const Site& site) {
  Thread& thread = *current;
  Block& block = *current_block;
  Warp& warp = block.warp[thread.warp()];
  thread.exchange = exchange;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.site = site;
  check_meeting(block, thread);
  mask &= ~warp.missing;
  warp.waiting |= 1u << thread.lane();
  if ((warp.waiting & mask) != mask) {
    thread.state = State::kInWarp;
    wait();
    return thread.result;
  }
  exchange_values(block, thread.warp(), mask);
  warp.waiting &= ~mask;
  for (uint32_t left = mask; left; left &= left - 1) {
    block.thread[thread.warp() * kWarpSize + __builtin_ctz(left)].state = State::kReady;
  }
  if (exchange == Exchange::kNothing) block.order.warp_met(thread.warp(), mask);
  ++counters.meetings;
  progress();
  return thread.result;
}

int meet_block(BlockVote vote, bool predicate, const Site& site) {
  Thread& thread = *current;
  Block& block = *current_block;
  thread.vote = vote;
  thread.predicate = predicate;
  thread.site = site;
  if (block.at_barrier) {
    const Thread& other = block.thread[block.first_at_barrier];
    if (!same_call(other.site, site)) {
      fail_at("barrier in divergent control flow: " + thread_name(thread) + " is at " +
                  call_name(thread) + ", " + thread_name(other) + " at " + call_name(other),
              __builtin_return_address(0));
    }
  } else {
    block.first_at_barrier = thread.id;
  }
  thread.state = State::kInBlock;
  block.warp[thread.warp()].stopped |= 1u << thread.lane();
  if (++block.at_barrier < block.threads) {
    wait();
    return static_cast<int>(thread.result);
  }
  int count = 0;
  for (int id = 0; id < block.threads; ++id) count += block.thread[id].predicate;
  const int all = vote == BlockVote::kAnd ? count == block.threads
                                          : (vote == BlockVote::kOr ? count > 0 : count);
  for (int id = 0; id < block.threads; ++id) {
    block.thread[id].result = static_cast<uint64_t>(all);
    block.thread[id].state = State::kReady;
  }
  for (Warp& warp : block.warp) warp.stopped = warp.missing;
  block.at_barrier = 0;
  block.order.block_met();
  ++counters.meetings;
  progress();
  return all;
}

void step_aside(bool waiting) {
  idle_yields += waiting;
  if (idle_yields > kIdleYields) {
    fail_at("livelock: threads spin, and none that could run goes on. Blocks start in any order; "
            "one that waits for another must have taken its number from an atomic counter",
            __builtin_return_address(0));
  }
  wait();
}

void yield() {
  if (current) step_aside(true);
}

void fence() {
  if (!current) return;
  current_block->order.fence(current->id);
  if (permuted() && rng.one_in(4)) yield();
}

void atomic_access(const volatile void* address, std::size_t size, const Site&) {
  if (!current) return;
  // A spinning thread must let others go on even where nothing is permuted.
  if (rng.one_in(permuted() ? 8 : 64)) yield();
  races_access(reinterpret_cast<uintptr_t>(address), size, Access::kSyncWrite,
               __builtin_return_address(0));
}

int lane() { return current->lane(); }
unsigned char* dynamic_shared() { return current_block->dynamic_shared.begin(); }
unsigned max_blocks() { return permuted() ? 1 + static_cast<unsigned>(options.seed % 3) : 8192; }
long long clock() { return static_cast<long long>(counters.meetings); }

// ------------------------------------------------------------ a launch

namespace {

// Runs a resident block for a while; true once all its threads have returned.
bool run_slice(Block& block) {
  enter(block);
  for (uint32_t passes = permuted() ? 1 + rng.below(8) : 1u; passes; --passes) {
    run_once(block);
    if (failed()) return false;
    if (block.done == block.threads) return true;
    if (!any_ready(block)) {
      fail(deadlock(block));
      return false;
    }
  }
  return false;
}

std::vector<uint32_t> block_order(uint64_t blocks) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (permuted()) rng.shuffle(order.data(), static_cast<int>(blocks));
  return order;
}

void run_blocks(uint64_t blocks) {
  const std::vector<uint32_t> order = block_order(blocks);
  const uint32_t resident = permuted() ? 1 + rng.below(kMostResident) : 1;
  std::vector<Block*> active;
  std::size_t next = 0;
  for (uint32_t i = 0; i < resident && next < blocks; ++i) {
    start_block(pool[i], order[next++]);
    active.push_back(&pool[i]);
  }
  while (!active.empty()) {
    const uint32_t turn = rng.below(static_cast<uint32_t>(active.size()));
    Block& block = *active[turn];
    const bool done = run_slice(block);
    if (failed()) return;
    if (!done) continue;
    current_block = nullptr;
    if (next < blocks) {
      start_block(block, order[next++]);
    } else {
      active.erase(active.begin() + turn);
    }
  }
}

}  // namespace

bool run(const Launch& launch) {
  running = &launch;
  gridDim = launch.config->gridDim;
  blockDim = launch.config->blockDim;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  progress();
  current_block = nullptr;
  races_begin(static_cast<uint32_t>(blocks));
  run_blocks(blocks);
  current = nullptr;
  current_block = nullptr;
  running = nullptr;
  if (!failed()) return true;
  for (Block& block : pool) {  // threads that wait will never go on
    for (Thread& thread : block.thread) {
      if (thread.fiber) thread.fiber->start(entry);
    }
  }
  return false;
}

// ------------------------------------------------------------ shared memory's places

Range static_shared() {
  struct Segment {
    uintptr_t anchor, offset, size;
  };
  static const Segment segment = [] {
    Segment found = {reinterpret_cast<uintptr_t>(&shared_anchor), 0, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          auto& found = *static_cast<Segment*>(out);
          const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
          for (int i = 0; begin && i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_TLS || found.anchor - begin >= header.p_memsz) continue;
            found.offset = found.anchor - begin;
            found.size = header.p_memsz;
          }
          return 0;
        },
        &found);
    return found;
  }();
  return {reinterpret_cast<uintptr_t>(&shared_anchor) - segment.offset, segment.size};
}

DynamicShared::~DynamicShared() {
  if (memory_) munmap(memory_, mapped_);
}

void DynamicShared::reserve(std::size_t bytes, bool guard_behind) {
  const std::size_t room = (bytes + page() - 1) / page() * page();
  if (room + 2 * page() > mapped_) {
    if (memory_) munmap(memory_, mapped_);
    mapped_ = room + 2 * page();
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
  }
  mprotect(memory_, mapped_, PROT_NONE);
  if (room) mprotect(memory_ + page(), room, PROT_READ | PROT_WRITE);
  size_ = bytes;
  begin_ = memory_ + page();
  if (guard_behind) begin_ += (room - bytes) / 16 * 16;  // as aligned as on a device
}

bool DynamicShared::guards(uintptr_t address) const {
  return address - reinterpret_cast<uintptr_t>(memory_) < mapped_;
}

}  // namespace emulation
