// Warp-level functions: barriers, votes, shuffles, matches, reductions.
#pragma once

#include <cstring>
#include <type_traits>

#include "emulation/device.h"

namespace emulation {

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "lanes exchange 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
  return from_bits<T>(meet_warp(Exchange::kShuffle, mask, to_bits(value), source, site));
}

}  // namespace emulation

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATION_CALLER) {
  emulation::meet_warp(emulation::Exchange::kNothing, mask, 0, 0, EMULATION_SITE("__syncwarp"));
}

// The calling lane alone: which others are converged with it nobody may rely on.
inline unsigned __activemask() { return 1u << emulation::lane(); }

// ------------------------------------------------------------ votes

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_CALLER) {
  return static_cast<unsigned>(emulation::meet_warp(
      emulation::Exchange::kBallot, mask, predicate != 0, 0, EMULATION_SITE("__ballot_sync")));
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_CALLER) {
  return emulation::meet_warp(emulation::Exchange::kBallot, mask, predicate != 0, 0,
                              EMULATION_SITE("__any_sync")) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_CALLER) {
  return emulation::meet_warp(emulation::Exchange::kBallot, mask, predicate == 0, 0,
                              EMULATION_SITE("__all_sync")) == 0;
}

// ------------------------------------------------------------ shuffles

// A source outside the lane's own section of `width` lanes gives the lane its own value back.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_CALLER) {
  const int own = emulation::lane();
  const int from = (own & ~(width - 1)) | (source & (width - 1));
  return emulation::shuffle(mask, value, from, EMULATION_SITE("__shfl_sync"));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_CALLER) {
  const int own = emulation::lane();
  const int from = own - static_cast<int>(delta);
  const bool inside = from >= (own & ~(width - 1));
  return emulation::shuffle(mask, value, inside ? from : own, EMULATION_SITE("__shfl_up_sync"));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_CALLER) {
  const int own = emulation::lane();
  const int from = own + static_cast<int>(delta);
  const bool inside = from <= (own | (width - 1));
  return emulation::shuffle(mask, value, inside ? from : own, EMULATION_SITE("__shfl_down_sync"));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATION_CALLER) {
  const int own = emulation::lane();
  const int from = own ^ lane_mask;
  const bool inside = from <= (own | (width - 1));
  return emulation::shuffle(mask, value, inside ? from : own, EMULATION_SITE("__shfl_xor_sync"));
}

// ------------------------------------------------------------ matches

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_CALLER) {
  return static_cast<unsigned>(emulation::meet_warp(emulation::Exchange::kMatchAny, mask,
                                                    emulation::to_bits(value), 0,
                                                    EMULATION_SITE("__match_any_sync")));
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal, EMULATION_CALLER) {
  const auto lanes = static_cast<unsigned>(
      emulation::meet_warp(emulation::Exchange::kMatchAll, mask, emulation::to_bits(value), 0,
                           EMULATION_SITE("__match_all_sync")));
  *all_equal = lanes != 0;
  return lanes;
}

// ------------------------------------------------------------ reductions

#define EMULATION_REDUCE(function, type, exchange)                                     \
  inline type function(unsigned mask, type value, EMULATION_CALLER) {                  \
    return static_cast<type>(emulation::meet_warp(emulation::Exchange::exchange, mask, \
                                                  static_cast<uint32_t>(value), 0,     \
                                                  EMULATION_SITE(#function)));         \
  }
EMULATION_REDUCE(__reduce_add_sync, unsigned, kAddU32)
EMULATION_REDUCE(__reduce_add_sync, int, kAddU32)
EMULATION_REDUCE(__reduce_min_sync, unsigned, kMinU32)
EMULATION_REDUCE(__reduce_min_sync, int, kMinS32)
EMULATION_REDUCE(__reduce_max_sync, unsigned, kMaxU32)
EMULATION_REDUCE(__reduce_max_sync, int, kMaxS32)
EMULATION_REDUCE(__reduce_and_sync, unsigned, kAnd)
EMULATION_REDUCE(__reduce_or_sync, unsigned, kOr)
EMULATION_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef EMULATION_REDUCE
