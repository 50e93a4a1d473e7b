// What stands in for the CUDA runtime where launchers run without a card: it remembers the names of
// kernels and hands every launch to a function of Python's (tools/sass/host.py).
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>

namespace {

// Grid, block and dynamic shared memory; one pointer a parameter. Not 0: the launch has failed.
using OnLaunch = int (*)(const char* kernel, const uint32_t* shape, void* const* parameters);

OnLaunch on_launch = nullptr;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;  // made at first use, by a static constructor
  return found;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void sass_on_launch(OnLaunch function) {
  on_launch = function;
}

// ------------------------------------------------------------ what nvcc's constructors call

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

// The stubs behind <<<>>>, which pydist does not use.
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorUnknown;
}

// ------------------------------------------------------------ what pydist calls

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  const auto found = names().find(kernel);
  if (!on_launch || found == names().end()) return cudaErrorInvalidDeviceFunction;
  const uint32_t shape[] = {config->gridDim.x, config->blockDim.x,
                            static_cast<uint32_t>(config->dynamicSmemBytes)};
  return on_launch(found->second.c_str(), shape, args) ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the kernel's machine code failed"; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  return cudaSuccess;
}

}  // extern "C"
