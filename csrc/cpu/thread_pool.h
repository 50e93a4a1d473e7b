// A few threads shared by all kernels; the caller works too.
#pragma once

#include <cstdint>
#include <functional>

namespace pydist::cpu {

// Runs task(0) ... task(tasks - 1) on at most `threads` threads, the calling one included, and
// returns when all are done. Calls may come from several threads at once and after fork().
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

}  // namespace pydist::cpu
