#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "faults.h"
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
uint64_t idle_yields;

namespace {

constexpr int kMostResident = 3, kMostWarps = 32;
constexpr uint64_t kIdleYields = 2'000'000;

const Launch* running;
Block pool[kMostResident];

bool permuted() { return options.seed != 0; }

// ------------------------------------------------------------ threads

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

}  // namespace

void progress() {
  idle_yields = 0;
  accesses_at_progress = counters.accesses;
}

void step_aside(bool waiting) {
  idle_yields += waiting;
  if (idle_yields > kIdleYields) {
    fail_at(
        "livelock: threads spin, and none that could run goes on. Blocks start in any order; "
        "one that waits for another must have taken its number from an atomic counter",
        nullptr);
  }
  current->fiber->leave();
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

}  // namespace emulation
