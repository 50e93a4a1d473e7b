// The runtime's functions, and how tests steer the emulator.
#include "emulation/runtime.h"

#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "faults.h"
#include "scheduler.h"

namespace emulation {
namespace {

constexpr std::size_t kSharedBytes = 48 << 10, kSharedBytesOptIn = 227 << 10;
constexpr unsigned kMostThreads = 1024;

std::mutex one_launch;
uint64_t order;  // launches since restart: each has an order of its own
std::string message = "no error";
cudaError_t last_error = cudaSuccess;
std::unordered_map<const void*, int> dynamic_shared_limit;
std::unordered_set<const void*> kernels_run;

cudaError_t refuse(cudaError_t error, const std::string& why) {
  message = why;
  return last_error = error;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto triple = [](const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "invalid grid " + triple(grid));
  }
  if (!block.x || !block.y || !block.z || block.x > kMostThreads || block.y > kMostThreads ||
      block.z > 64 || block.x * block.y * block.z > kMostThreads) {
    return refuse(cudaErrorInvalidConfiguration, "invalid block " + triple(block));
  }
  const auto found = dynamic_shared_limit.find(kernel);
  const std::size_t limit =
      found == dynamic_shared_limit.end() ? kSharedBytes : static_cast<std::size_t>(found->second);
  if (config.dynamicSmemBytes > limit) {
    return refuse(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of dynamic shared memory, but " +
                                             std::to_string(limit) +
                                             " are allowed (cudaFuncSetAttribute)");
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Invoke invoke,
                   const void* arguments) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (const cudaError_t error = check(config, kernel)) return error;
  ++counters.launches;
  counters.kernels += kernels_run.insert(kernel).second;
  rng.seed(options.seed * 0x9E3779B97F4A7C15u + ++order);
  std::fenv_t host;  // the device flushes nothing and rounds to nearest, whatever the host does
  std::fegetenv(&host);
  std::fesetenv(FE_DFL_ENV);
  const FaultHandlers handlers;
  const bool done = run({&config, kernel, invoke, arguments});
  std::fesetenv(&host);
  if (done) return cudaSuccess;
  const std::string name = symbol(kernel);
  return refuse(cudaErrorLaunchFailure, take_failure() + " [kernel " + name + "]");
}

cudaError_t allow_dynamic_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > kSharedBytesOptIn) {
    return refuse(cudaErrorInvalidValue, std::to_string(bytes) + " bytes of dynamic shared memory");
  }
  dynamic_shared_limit[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace emulation

using emulation::last_error;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaError_t{cudaSuccess}); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulation::message.c_str();
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  return device ? emulation::refuse(cudaErrorInvalidValue, "there is one device") : cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "emulated");
  properties->multiProcessorCount = 2;
  properties->major = 9;
  properties->sharedMemPerBlock = emulation::kSharedBytes;
  properties->sharedMemPerBlockOptin = emulation::kSharedBytesOptIn;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 2, cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemset(void* at, int value, std::size_t bytes) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
  return cudaMemset(at, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMalloc(void** at, std::size_t bytes) {
  *at = std::malloc(bytes);
  return *at || !bytes ? cudaSuccess : emulation::refuse(cudaErrorInvalidValue, "out of memory");
}
cudaError_t cudaMallocAsync(void** at, std::size_t bytes, cudaStream_t) {
  return cudaMalloc(at, bytes);
}
cudaError_t cudaFree(void* at) {
  std::free(at);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* at, cudaStream_t) { return cudaFree(at); }

// ------------------------------------------------------------ for tests, through ctypes

extern "C" {

// The next launches take this order (0: none is permuted), and report data races or not.
__attribute__((visibility("default"))) void emulation_configure(uint64_t seed, int races) {
  emulation::options = {seed, races != 0};
}

// Launches that follow run as those after the last restart did.
__attribute__((visibility("default"))) void emulation_restart() { emulation::order = 0; }

// kernels (functions run), launches, blocks, threads, meetings, accesses since the process began.
__attribute__((visibility("default"))) void emulation_counters(uint64_t (&out)[6]) {
  const auto& c = emulation::counters;
  const uint64_t all[6] = {c.kernels, c.launches, c.blocks, c.threads, c.meetings, c.accesses};
  std::memcpy(out, all, sizeof all);
}
}
