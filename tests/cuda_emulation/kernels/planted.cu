// Kernels with a bug each, planted where `bug` says so: what the emulator must find. Without the
// bug they are right, and must pass.
#include <cstring>

#include "test_kernels.h"

namespace {

constexpr int kThreads = 128;

// Every block reverses its 128 elements, through shared memory.
__global__ void missing_syncthreads(const uint32_t* in, uint32_t* out, int, bool bug) {
  __shared__ uint32_t tile[kThreads];
  const unsigned at = blockIdx.x * kThreads;
  tile[threadIdx.x] = in[at + threadIdx.x];
  if (!bug) __syncthreads();
  out[at + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Every warp reverses its 32 elements, through shared memory.
__global__ void missing_syncwarp(const uint32_t* in, uint32_t* out, int, bool bug) {
  __shared__ uint32_t tile[kThreads];
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x] = in[i];
  if (!bug) __syncwarp();
  out[i] = tile[threadIdx.x ^ 31];
}

// The same with a shuffle in place of the barrier: lanes wait for each other, but memory is not
// ordered by it.
__global__ void shuffle_is_no_barrier(const uint32_t* in, uint32_t* out, int, bool bug) {
  __shared__ uint32_t tile[kThreads];
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x] = in[i];
  const uint32_t sum = __shfl_xor_sync(~0u, in[i], 1) & 0u;
  if (!bug) __syncwarp();
  out[i] = tile[threadIdx.x ^ 31] + sum;
}

__global__ void tail_read(const uint32_t* in, uint32_t* out, int n, bool bug) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const uint32_t value = i < n + bug ? in[i] : 0;
  if (i < n) out[i] = value;
}

__global__ void tail_write(const uint32_t* in, uint32_t* out, int n, bool bug) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const uint32_t value = i < n ? in[i] : 0;
  if (i < n + bug) out[i] = value;
}

// The sum of a warp's elements, in every lane.
__global__ void wrong_lane(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  uint32_t sum = in[i];
  for (int distance = 16; distance; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, bug && distance == 4 ? 2 : distance);
  }
  out[i] = sum;
}

// What a lane gets from one that is not in the mask is undefined.
__global__ void lane_outside_mask(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const unsigned half = threadIdx.x & 16 ? 0xFFFF0000u : 0x0000FFFFu;
  out[i] = __shfl_sync(half, in[i], static_cast<int>(bug ? 15 : (threadIdx.x & 16) + 15));
}

// How often each value below 8 occurs, counted in shared memory.
__global__ void uninitialised_shared(const uint32_t* in, uint32_t* out, int, bool bug) {
  __shared__ uint32_t bins[8];
  if (!bug && threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[in[blockIdx.x * kThreads + threadIdx.x] & 7], 1u);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(out + threadIdx.x, bins[threadIdx.x]);
}

__global__ void uninitialised_dynamic_shared(const uint32_t* in, uint32_t* out, int, bool bug) {
  PYDIST_DYNAMIC_SHARED(uint32_t, bins);
  if (!bug && threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[in[blockIdx.x * kThreads + threadIdx.x] & 7], 1u);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(out + threadIdx.x, bins[threadIdx.x]);
}

__global__ void missing_atomic(const uint32_t* in, uint32_t* out, int, bool bug) {
  uint32_t* bin = out + (in[blockIdx.x * kThreads + threadIdx.x] & 7);
  if (bug) {
    *bin += 1;
  } else {
    atomicAdd(bin, 1u);
  }
}

__global__ void skipped_barrier(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (!bug || threadIdx.x != 17) __syncthreads();
  out[i] = in[i];
}

__global__ void divergent_barrier(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (bug && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[i] = in[i];
}

// Bit i of a warp's word: element i is odd.
__global__ void wrong_mask(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = __ballot_sync(bug ? 0xFFFFu : ~0u, in[i] & 1);
}

__global__ void missing_lanes(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  uint32_t word = 0;
  if (!bug || threadIdx.x % 32 < 30) word = __ballot_sync(~0u, in[i] & 1);
  __syncwarp();
  out[i] = word;
}

__global__ void shared_index(const uint32_t* in, uint32_t* out, int, bool bug) {
  __shared__ uint32_t tile[kThreads];
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x + bug] = in[i];
  out[i] = tile[threadIdx.x + bug];
}

__global__ void beyond_dynamic_shared(const uint32_t* in, uint32_t* out, int, bool bug) {
  PYDIST_DYNAMIC_SHARED(uint32_t, tile);
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x + bug] = in[i];
  out[i] = tile[threadIdx.x + bug];
}

__global__ void before_dynamic_shared(const uint32_t* in, uint32_t* out, int, bool bug) {
  PYDIST_DYNAMIC_SHARED(uint32_t, tile);
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const int place = static_cast<int>(threadIdx.x) - bug;
  tile[place] = in[i];
  out[i] = tile[place];
}

__global__ void misaligned(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  uint2 pair = {in[i], 0};
  if (threadIdx.x == 0) pair = *reinterpret_cast<const uint2*>(in + i + bug);
  out[i] = threadIdx.x || !bug ? pair.x : 0;
}

// The last block to finish copies what all have written: the counter alone orders nothing.
__global__ void missing_fence(const uint32_t* in, uint32_t* out, int n, bool bug) {
  __shared__ bool last;
  uint32_t* partial = out + n;
  uint32_t* finished = partial + gridDim.x;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = in[blockIdx.x * kThreads];
    if (!bug) __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    if (!bug) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < gridDim.x) out[threadIdx.x] = partial[threadIdx.x];
}

// Waits for the block behind, which may not have started.
__global__ void waits_for_later_block(const uint32_t* in, uint32_t* out, int, bool bug) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  volatile uint32_t* flag = out + gridDim.x * kThreads;
  if (bug && threadIdx.x == 0) {
    if (blockIdx.x == gridDim.x - 1) *flag = 1;
    while (*flag == 0) continue;
  }
  out[i] = in[i];
}

#define PLANTED(kernel) {#kernel, kernel}
const struct {
  const char* name;
  void (*kernel)(const uint32_t*, uint32_t*, int, bool);
} kPlanted[] = {
    PLANTED(missing_syncthreads),
    PLANTED(missing_syncwarp),
    PLANTED(shuffle_is_no_barrier),
    PLANTED(tail_read),
    PLANTED(tail_write),
    PLANTED(wrong_lane),
    PLANTED(lane_outside_mask),
    PLANTED(uninitialised_shared),
    PLANTED(uninitialised_dynamic_shared),
    PLANTED(missing_atomic),
    PLANTED(skipped_barrier),
    PLANTED(divergent_barrier),
    PLANTED(wrong_mask),
    PLANTED(missing_lanes),
    PLANTED(shared_index),
    PLANTED(beyond_dynamic_shared),
    PLANTED(before_dynamic_shared),
    PLANTED(misaligned),
    PLANTED(missing_fence),
    PLANTED(waits_for_later_block),
};

}  // namespace

// Runs a kernel over n elements, 128 a block; the answer is what went wrong, or "no error".
extern "C" const char* planted(const char* name, int bug, const uint32_t* in, uint32_t* out,
                               int n) {
  const unsigned blocks = static_cast<unsigned>((n + kThreads - 1) / kThreads);
  for (const auto& entry : kPlanted) {
    if (std::strcmp(entry.name, name)) continue;
    return launch_test(entry.kernel, dim3(blocks), dim3(kThreads), kThreads * sizeof(uint32_t), in,
                       out, n, bug != 0);
  }
  return "no such kernel";
}
