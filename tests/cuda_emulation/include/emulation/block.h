// Barriers of a block, memory fences, and shared memory.
#pragma once

#include "emulation/device.h"

// Shared variables are thread-local ones of the one thread that emulates: that puts them all, those
// of templates too, into one segment, which the emulator poisons before every block and swaps where
// blocks take turns.
#define __shared__ static thread_local

// `extern __shared__` can't be had from a macro that also makes `__shared__` static: kernels name
// their dynamic shared memory with PYDIST_DYNAMIC_SHARED (csrc/cuda/common.cuh).
#define EMULATION_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(emulation::dynamic_shared())

inline void __syncthreads(EMULATION_CALLER) {
  emulation::meet_block(emulation::BlockVote::kNone, false, EMULATION_SITE("__syncthreads"));
}
inline int __syncthreads_count(int predicate, EMULATION_CALLER) {
  return emulation::meet_block(emulation::BlockVote::kCount, predicate != 0,
                               EMULATION_SITE("__syncthreads_count"));
}
inline int __syncthreads_and(int predicate, EMULATION_CALLER) {
  return emulation::meet_block(emulation::BlockVote::kAnd, predicate != 0,
                               EMULATION_SITE("__syncthreads_and"));
}
inline int __syncthreads_or(int predicate, EMULATION_CALLER) {
  return emulation::meet_block(emulation::BlockVote::kOr, predicate != 0,
                               EMULATION_SITE("__syncthreads_or"));
}

inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() { emulation::fence(); }
inline void __threadfence_system() { emulation::fence(); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline long long clock64() { return emulation::clock(); }
