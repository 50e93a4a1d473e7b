// Atomic functions. Fibers never run at the same time, so a plain read and write in one go are
// atomic; atomic_access() lets others go first and tells the race detector.
#pragma once

#include "emulation/device.h"
#include "emulation/warp.h"

namespace emulation {

template <typename T, typename Update>
__attribute__((no_sanitize("thread"))) T read_modify_write(T* address, const Site& site,
                                                           const Update& update) {
  atomic_access(address, sizeof(T), site);
  T old;
  std::memcpy(&old, address, sizeof old);
  const T now = update(old);
  std::memcpy(address, &now, sizeof now);
  return old;
}

}  // namespace emulation

#define EMULATION_ATOMIC(function, type, expression)                                              \
  inline type function(type* address, type value, EMULATION_CALLER) {                             \
    return emulation::read_modify_write(address, EMULATION_SITE(#function),                       \
                                        [=](type old) { return static_cast<type>(expression); }); \
  }
#define EMULATION_ATOMIC_32(function, expression) \
  EMULATION_ATOMIC(function, int, expression)     \
  EMULATION_ATOMIC(function, unsigned, expression)
#define EMULATION_ATOMIC_ALL(function, expression) \
  EMULATION_ATOMIC_32(function, expression)        \
  EMULATION_ATOMIC(function, unsigned long long, expression)

EMULATION_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
EMULATION_ATOMIC(atomicAdd, unsigned, old + value)
EMULATION_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATION_ATOMIC(atomicAdd, float, old + value)
EMULATION_ATOMIC(atomicAdd, double, old + value)
EMULATION_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(value))
EMULATION_ATOMIC(atomicSub, unsigned, old - value)
EMULATION_ATOMIC_ALL(atomicExch, (static_cast<void>(old), value))
EMULATION_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
EMULATION_ATOMIC_ALL(atomicMin, old < value ? old : value)
EMULATION_ATOMIC(atomicMin, long long, old < value ? old : value)
EMULATION_ATOMIC_ALL(atomicMax, old > value ? old : value)
EMULATION_ATOMIC(atomicMax, long long, old > value ? old : value)
EMULATION_ATOMIC_ALL(atomicAnd, old& value)
EMULATION_ATOMIC_ALL(atomicOr, old | value)
EMULATION_ATOMIC_ALL(atomicXor, old ^ value)
EMULATION_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMULATION_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)

#undef EMULATION_ATOMIC
#undef EMULATION_ATOMIC_32
#undef EMULATION_ATOMIC_ALL

#define EMULATION_CAS(type)                                                                      \
  inline type atomicCAS(type* address, type compare, type value, EMULATION_CALLER) {             \
    return emulation::read_modify_write(address, EMULATION_SITE("atomicCAS"),                    \
                                        [=](type old) { return old == compare ? value : old; }); \
  }
EMULATION_CAS(int)
EMULATION_CAS(unsigned)
EMULATION_CAS(unsigned short)
EMULATION_CAS(unsigned long long)
#undef EMULATION_CAS
