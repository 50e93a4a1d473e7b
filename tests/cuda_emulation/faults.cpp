#include "faults.h"

#include <dlfcn.h>
#include <sys/ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "races.h"
#include "report.h"

namespace emulation {
namespace {

std::string failure;

std::string hex(uintptr_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<std::size_t>(value));
  return text;
}

// Lines of addr2line, the innermost function first; empty where the tool is missing.
std::string addr2line(const char* module, uintptr_t offset) {
  const std::string command =
      std::string("addr2line -Cfsi -e '") + module + "' " + hex(offset) + " 2>/dev/null";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return "";
  std::string text;
  std::array<char, 512> line;
  while (std::fgets(line.data(), line.size(), pipe)) text += line.data();
  pclose(pipe);
  return text;
}

// "f<int>" of "void f<int>(int)".
std::string without_arguments(const std::string& function) {
  const std::size_t begin = function.rfind("void ", 0) == 0 ? 5 : 0;
  int depth = 0;
  for (std::size_t i = begin; i < function.size(); ++i) {
    depth += (function[i] == '<') - (function[i] == '>');
    if (function[i] == '(' && depth == 0) return function.substr(begin, i - begin);
  }
  return function.substr(begin);
}

const char* what_is_there(uintptr_t address) {
  if (!current) return "";
  if (current->fiber->below_stack(address)) return " (the end of the thread's stack)";
  if (current_block->dynamic_shared.guards(address)) return " (outside dynamic shared memory)";
  return address < 65536 ? " (null)" : "";
}

bool is_write(const void* context) {
#if defined(__x86_64__)
  return static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2;
#else
  static_cast<void>(context);
  return false;
#endif
}

const void* program_counter(const void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(
      static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#else
  static_cast<void>(context);
  return nullptr;
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!current) {  // not a kernel's doing
    std::signal(signal, SIG_DFL);
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  fail_at(std::string("out-of-range ") + (is_write(context) ? "write" : "read") + " at " +
              hex(address) + what_is_there(address),
          static_cast<const char*>(program_counter(context)) + 1);
}

// Of a size that a std::string built in the handler fits into comfortably.
alignas(16) unsigned char signal_stack[256 << 10];

}  // namespace

std::string symbol(const void* address) {
  Dl_info info;
  if (!address || !dladdr(address, &info)) return "";
  const auto offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::string text = addr2line(info.dli_fname, offset);
  std::string function = text.substr(0, text.find('\n'));
  if (function.empty() || function == "??") return hex(offset);
  text.erase(0, function.size() + 1);
  const std::string file = text.substr(0, text.find_first_of("\n "));
  for (const char* noise : {"(anonymous namespace)::", "pydist::cuda::"}) {
    while (function.find(noise) != std::string::npos) {
      function.erase(function.find(noise), std::strlen(noise));
    }
  }
  return without_arguments(function) + " at " + file.substr(file.rfind('/') + 1);
}

void fail(const std::string& message) {
  if (failure.empty()) failure = message;
}

void fail_at(const std::string& message, const void* where) {
  if (!current) {
    std::fprintf(stderr, "emulation: outside a kernel: %s\n", message.c_str());
    std::abort();
  }
  // A return address is one behind the call, and may be the next line's.
  const std::string code =
      where ? ", in " + symbol(static_cast<const char*>(where) - 1) : std::string();
  fail(message + ", " + block_name(*current_block) + ", " + thread_name(*current) + code);
  Fiber::abandon();
}

bool failed() { return !failure.empty(); }

std::string take_failure() {
  std::string taken;
  taken.swap(failure);
  return taken;
}

FaultHandlers::FaultHandlers() {
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &saved_stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler doesn't return
  sigaction(SIGSEGV, &action, &saved_segv_);
  sigaction(SIGBUS, &action, &saved_bus_);
}

FaultHandlers::~FaultHandlers() {
  sigaction(SIGSEGV, &saved_segv_, nullptr);
  sigaction(SIGBUS, &saved_bus_, nullptr);
  sigaltstack(&saved_stack_, nullptr);
}

}  // namespace emulation

// ------------------------------------------------------------ the compiler's checks

// What -fsanitize=alignment,bounds calls, with the layout of its data that GCC and Clang share; the
// tools' own runtime would print and abort without knowing kernels.
extern "C" {

struct SourcePlace {
  const char* file;
  uint32_t line, column;
};
struct TypeName {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourcePlace place;
  const TypeName* type;
  unsigned char log_alignment, check_kind;
};
struct OutOfBounds {
  SourcePlace place;
  const TypeName *array, *index;
};

static std::string placed(const SourcePlace& place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(" (") + (slash ? slash + 1 : place.file) + ":" + std::to_string(place.line) +
         ")";
}

__attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(
    const TypeMismatch* data, uintptr_t address) {
  const unsigned alignment = 1u << data->log_alignment;
  char text[200];
  std::snprintf(text, sizeof text,
                "misaligned access to %s at 0x%zx, which is not a multiple of %u", data->type->name,
                static_cast<std::size_t>(address), alignment);
  emulation::fail_at(text + placed(data->place), __builtin_return_address(0));
}

__attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds_abort(
    const OutOfBounds* data, uintptr_t index) {
  emulation::fail_at("index " + std::to_string(static_cast<intptr_t>(index)) +
                         " out of bounds of array " + data->array->name + placed(data->place),
                     __builtin_return_address(0));
}

}  // extern "C"
