// How messages name threads, calls, and what went wrong between them. Internal to the emulator.
#pragma once

#include <string>

#include "scheduler.h"

namespace emulation {

std::string thread_name(const Thread& thread);  // "thread (1, 0, 0)"
std::string block_name(const Block& block);     // "block (2, 0, 0)"
std::string call_name(const Thread& thread);    // where it waits, and for which lanes
std::string divergence(const Block& block, const Thread& thread, int lane);
std::string deadlock(const Block& block);  // who waits where, and who is missing

}  // namespace emulation
