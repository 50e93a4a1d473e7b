// Where threads wait for each other: meetings of the lanes of a warp, barriers of a block.
#include <algorithm>
#include <cstring>

#include "faults.h"
#include "report.h"
#include "scheduler.h"

namespace emulation {
namespace {

bool same_call(const Site& a, const Site& b) {
  return a.line == b.line && !std::strcmp(a.function, b.function) && !std::strcmp(a.file, b.file);
}

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
  if (!(thread.mask & bit)) {
    fail_at(call_name(thread) + " lacks the bit of lane " + std::to_string(thread.lane()) +
                ", which calls it",
            nullptr);
  }
  const uint32_t gone = thread.mask & warp.stopped & ~warp.missing;
  if (gone) fail_at(divergence(block, thread, __builtin_ctz(gone)), nullptr);
  for (uint32_t left = warp.waiting & thread.mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const Thread& other = block.thread[thread.warp() * kWarpSize + lane];
    if (!(other.mask & bit)) continue;  // it meets others first
    if (other.mask == thread.mask && same_call(other.site, thread.site)) continue;
    fail_at(divergence(block, thread, lane), nullptr);
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
    current->fiber->leave();
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
              nullptr);
    }
  } else {
    block.first_at_barrier = thread.id;
  }
  thread.state = State::kInBlock;
  block.warp[thread.warp()].stopped |= 1u << thread.lane();
  if (++block.at_barrier < block.threads) {
    current->fiber->leave();
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

}  // namespace emulation
