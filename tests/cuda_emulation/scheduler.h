// Grids, blocks and threads of one launch, and who runs next. Internal to the emulator.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulation/runtime.h"
#include "fiber.h"
#include "races.h"
#include "random.h"
#include "shared_memory.h"

namespace emulation {

enum class State : unsigned char { kReady, kInWarp, kInBlock, kDone };

struct Thread {
  State state;
  Exchange exchange;
  BlockVote vote;
  bool predicate;
  int source;
  uint32_t mask;
  uint64_t value, result;
  Site site;  // where it waits, or last waited
  uint3 index;
  int id;  // within its block
  std::unique_ptr<Fiber> fiber;

  int lane() const { return id % kWarpSize; }
  int warp() const { return id / kWarpSize; }
};

// Lanes by what they do, one bit each.
struct Warp {
  uint32_t waiting;  // in a meeting of the warp
  uint32_t stopped;  // at a block barrier, returned, or never there (the block ends mid-warp)
  uint32_t missing;  // never there

  uint32_t ready() const { return ~(waiting | stopped); }
};

struct Block {
  uint3 index;
  uint32_t number;  // in the grid
  int threads;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  int at_barrier, done;
  int first_at_barrier;                      // a thread that waits there
  std::vector<unsigned char> static_shared;  // while another block runs
  DynamicShared dynamic_shared;
  BlockOrder order;
  bool poisoned;  // its shared memory was prepared

  int warps() const { return (threads + kWarpSize - 1) / kWarpSize; }
};

struct Launch {
  const cudaLaunchConfig_t* config;
  const void* kernel;
  Invoke invoke;
  const void* arguments;
};

// How the next launches run.
struct Options {
  uint64_t seed = 0;  // 0: threads, warps and blocks in order, one block at a time
  bool races = true;  // report data races
};

struct Counters {
  uint64_t kernels, launches, blocks, threads, meetings, accesses;
};

extern Options options;
extern Counters counters;
extern Random rng;

// The thread that runs, or null: the host.
extern Thread* current;
extern Block* current_block;

// When threads last met or returned: how long ago that is tells a loop without end.
extern uint64_t accesses_at_progress;

// Threads met, or one returned.
void progress();

// Lets others run first. `waiting`: it may be others that this thread waits for.
void step_aside(bool waiting);

// Runs a grid; false if it failed, and failure() says why.
bool run(const Launch& launch);

}  // namespace emulation
