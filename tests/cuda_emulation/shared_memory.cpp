#include "shared_memory.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace emulation {
namespace {

thread_local char anchor;  // some place among the thread-local variables of this library

std::size_t page() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Range static_shared() {
  struct Segment {
    uintptr_t place, offset, size;
  };
  static const Segment segment = [] {
    Segment found = {reinterpret_cast<uintptr_t>(&anchor), 0, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          auto& found = *static_cast<Segment*>(out);
          const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
          for (int i = 0; begin && i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_TLS || found.place - begin >= header.p_memsz) continue;
            found.offset = found.place - begin;
            found.size = header.p_memsz;
          }
          return 0;
        },
        &found);
    return found;
  }();
  return {reinterpret_cast<uintptr_t>(&anchor) - segment.offset, segment.size};
}

DynamicShared::~DynamicShared() {
  if (memory_) munmap(memory_, mapped_);
}

void DynamicShared::reserve(std::size_t bytes, bool guard_behind) {
  const std::size_t room = (bytes + page() - 1) / page() * page();
  if (room + 2 * page() > mapped_) {
    if (memory_) munmap(memory_, mapped_);
    mapped_ = room + 2 * page();
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
  }
  mprotect(memory_, mapped_, PROT_NONE);
  if (room) mprotect(memory_ + page(), room, PROT_READ | PROT_WRITE);
  size_ = bytes;
  begin_ = memory_ + page();
  if (guard_behind) begin_ += (room - bytes) / 16 * 16;  // as aligned as on a device
}

bool DynamicShared::guards(uintptr_t address) const {
  return address - reinterpret_cast<uintptr_t>(memory_) < mapped_;
}

}  // namespace emulation
