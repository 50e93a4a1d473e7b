#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <new>

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
const std::size_t kGuardBytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

sigjmp_buf home;  // of the one resume() that waits

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  mprotect(memory_, kGuardBytes, PROT_NONE);
}

Fiber::~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  running_ = false;
}

void Fiber::resume() {
  if (sigsetjmp(home, 0)) return;
  if (running_) siglongjmp(here_, 1);
  running_ = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = memory_ + kGuardBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry_, 0);
  setcontext(&context);
}

void Fiber::leave() {
  if (!sigsetjmp(here_, 0)) siglongjmp(home, 1);
}

void Fiber::abandon() { siglongjmp(home, 1); }

bool Fiber::on_stack(uintptr_t address) const {
  return address - reinterpret_cast<uintptr_t>(memory_) - kGuardBytes < kStackBytes;
}

bool Fiber::below_stack(uintptr_t address) const {
  return address - reinterpret_cast<uintptr_t>(memory_) < kGuardBytes;
}

}  // namespace emulation
