// Stands in for CUDA's header of this name: kernels compile as C++ and run on a CPU. What each part
// can and can't show: docs/emulation.md.
#pragma once

#define EMULATION 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))  // unlike alignas, after __shared__ too

#include "emulation/arithmetic.h"
#include "emulation/atomics.h"
#include "emulation/block.h"
#include "emulation/device.h"
#include "emulation/runtime.h"
#include "emulation/vector_types.h"
#include "emulation/warp.h"
