#include "report.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

namespace emulation {
namespace {

std::string triple(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
         ")";
}

std::string place(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// What a thread did, as the end of "thread 3 …".
std::string doing(const Thread& thread) {
  switch (thread.state) {
    case State::kDone:
      return "returned";
    case State::kReady:
      return "did not come yet";
    default:
      return "stopped at " + call_name(thread);
  }
}

// "0-16, 18-255".
std::string ranges(const std::vector<int>& ids) {
  std::string text;
  for (std::size_t i = 0; i < ids.size();) {
    std::size_t last = i;
    while (last + 1 < ids.size() && ids[last + 1] == ids[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(ids[i]);
    if (last > i) text += "-" + std::to_string(ids[last]);
    i = last + 1;
  }
  return text;
}

}  // namespace

std::string thread_name(const Thread& thread) { return "thread " + triple(thread.index); }
std::string block_name(const Block& block) { return "block " + triple(block.index); }

std::string call_name(const Thread& thread) {
  std::string text = std::string(thread.site.function) + " (" + place(thread.site);
  if (thread.state != State::kInBlock && std::strncmp(thread.site.function, "__syncthreads", 13)) {
    char mask[24];
    std::snprintf(mask, sizeof mask, ", mask 0x%08x", thread.mask);
    text += mask;
  }
  return text + ")";
}

std::string divergence(const Block& block, const Thread& thread, int lane) {
  const Thread& other = block.thread[thread.warp() * kWarpSize + lane];
  return "lanes diverge: " + call_name(thread) + " of " + thread_name(thread) + " names lane " +
         std::to_string(lane) + ", but " + thread_name(other) + " " + doing(other);
}

std::string deadlock(const Block& block) {
  std::map<std::string, std::vector<int>> groups;
  for (int id = 0; id < block.threads; ++id) groups[doing(block.thread[id])].push_back(id);
  std::string text =
      "deadlock in " + block_name(block) + " of " + std::to_string(block.threads) + " threads: ";
  bool first = true;
  for (const auto& [what, ids] : groups) {
    text += (first ? "" : "; ") + std::string(ids.size() > 1 ? "threads " : "thread ") +
            ranges(ids) + " " + what;
    first = false;
  }
  for (int id = 0; id < block.threads; ++id) {  // whom the first one in a warp's meeting misses
    const Thread& thread = block.thread[id];
    if (thread.state != State::kInWarp) continue;
    const Warp& warp = block.warp[thread.warp()];
    std::vector<int> missing;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if ((thread.mask & ~warp.missing & ~warp.waiting) >> lane & 1) missing.push_back(lane);
    }
    text += "; lanes " + ranges(missing) + " are missing at " + call_name(thread);
    return text;
  }
  return text;
}

}  // namespace emulation
