// A function with a stack of its own that can be left and continued.
//
// ucontext makes the stack; switching is sigsetjmp and siglongjmp without the signal mask, because
// swapcontext makes a system call each time (measured: 17 to 29 ns a switch instead of 270 to 340;
// Boost.Context, 5 to 6 ns, would be a dependency for a saving of microseconds a block).
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>

namespace emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(), which never returns. What the fiber did before is forgotten.
  void start(void (*entry)());

  // Runs the fiber until it calls leave(). Not from within a fiber.
  void resume();

  // Back to resume(). From a signal handler too, if the fiber is to be started anew.
  [[noreturn]] static void abandon();
  void leave();

  bool on_stack(uintptr_t address) const;     // what the fiber may touch
  bool below_stack(uintptr_t address) const;  // where an overflow ends
  bool started() const { return entry_ != nullptr; }

 private:
  unsigned char* memory_;
  void (*entry_)() = nullptr;
  bool running_ = false;
  sigjmp_buf here_;
};

}  // namespace emulation
