// What a running thread asks of the emulator: who it is, and to wait for others.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulation/vector_types.h"

namespace emulation {

constexpr int kWarpSize = 32;

// Where a kernel's source calls something that waits: barriers are told apart and named by it. A
// default argument is evaluated at the call, so no macro is needed and a barrier that the compiler
// duplicated keeps its one place.
struct Site {
  const char* function;  // of CUDA, e.g. "__syncthreads"
  const char* file;
  int line;
};

// What the lanes that meet compute from their values.
enum class Exchange : unsigned char {
  kNothing,   // a barrier
  kBallot,    // bit i: lane i's value is not 0
  kShuffle,   // the value of lane `source`
  kMatchAny,  // lanes with the same value
  kMatchAll,  // all lanes if all values are equal, else none
  kAddU32,
  kMinU32,
  kMaxU32,
  kMinS32,
  kMaxS32,
  kAnd,
  kOr,
  kXor,
};

// Waits for every lane of `mask`; all must make the same call. `source` may name a lane outside the
// mask: what it then gets is noise, as on a GPU.
uint64_t meet_warp(Exchange exchange, uint32_t mask, uint64_t value, int source, const Site& site);

enum class BlockVote : unsigned char { kNone, kCount, kAnd, kOr };

// Waits for every thread of the block.
int meet_block(BlockVote vote, bool predicate, const Site& site);

// A place where the hardware may run someone else first: threads that spin let others go on.
void yield();

// A memory fence of the calling thread.
void fence();

// Atomic access to `size` bytes: others may go first; plain accesses to the same bytes are a race.
void atomic_access(const volatile void* address, std::size_t size, const Site& site);

int lane();
unsigned char* dynamic_shared();
unsigned max_blocks();  // stands in for PYDIST_CUDA_MAX_BLOCKS; depends on the seed
long long clock();

}  // namespace emulation

// Set whenever another thread continues.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = emulation::kWarpSize;

#define EMULATION_SITE(function) \
  emulation::Site { function, file, line }
#define EMULATION_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
