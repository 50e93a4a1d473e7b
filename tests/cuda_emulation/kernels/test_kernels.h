// Launching the emulator's own test kernels. They are CUDA: nvcc compiles them too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common.cuh"  // of csrc/cuda, for PYDIST_DYNAMIC_SHARED

template <typename... Params, typename... Args>
const char* launch_test(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared,
                        Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  const char* message =
      cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
  cudaGetLastError();
  return message;
}
