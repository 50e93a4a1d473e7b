// What ends a launch: named, with kernel, block and thread. Internal to the emulator.
#pragma once

#include <csignal>
#include <cstdint>
#include <string>

namespace emulation {

// Ends the launch that runs with this message; from a thread of it, or from the scheduler.
void fail(const std::string& message);

// The same from within a thread, whose code will return to `where`; null where the message says.
[[noreturn]] void fail_at(const std::string& message, const void* where);

bool failed();
std::string take_failure();

// "function at file:line" of an address in this module, as far as debug information tells.
std::string symbol(const void* address);

// While it lives, invalid accesses of threads end the launch instead of the process.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;

 private:
  struct sigaction saved_segv_, saved_bus_;
  stack_t saved_stack_;
};

}  // namespace emulation
