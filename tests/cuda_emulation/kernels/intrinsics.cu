// Every function of the stand-ins, so that the tests can compare it with a plain loop.
#include "test_kernels.h"

namespace {

// Writes one result after another, each as a row of n.
class Rows {
 public:
  __device__ Rows(uint32_t* out, int n, int i) : out_(out), n_(n), i_(i) {}
  template <typename T>
  __device__ void put(T value) {
    static_assert(sizeof(T) == 4);
    memcpy(out_ + row_++ * n_ + i_, &value, sizeof value);
  }

 private:
  uint32_t* out_;
  int n_, i_, row_ = 0;
};

__device__ int flat_thread() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}
__device__ int flat_index() {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return static_cast<int>(block * blockDim.x * blockDim.y * blockDim.z) + flat_thread();
}

__global__ void lanes(const uint32_t* in, uint32_t* out, int n) {
  const int i = flat_index();
  const uint32_t x = in[i];
  const unsigned all = ~0u;
  const unsigned half = flat_thread() & 16 ? 0xFFFF0000u : 0x0000FFFFu;
  int equal = 0;
  Rows rows(out, n, i);
  rows.put(__ballot_sync(all, x & 1));
  rows.put(__ballot_sync(half, x & 1));
  rows.put(__any_sync(all, x == 3));
  rows.put(__all_sync(all, x != 3));
  rows.put(__shfl_sync(all, x, 5));
  rows.put(__shfl_sync(all, x, 5, 8));
  rows.put(__shfl_up_sync(all, x, 3));
  rows.put(__shfl_up_sync(all, x, 3, 16));
  rows.put(__shfl_down_sync(all, x, 3));
  rows.put(__shfl_down_sync(all, x, 3, 16));
  rows.put(__shfl_xor_sync(all, x, 9));
  rows.put(__shfl_xor_sync(half, x, 9, 16));
  rows.put(static_cast<uint32_t>(__shfl_xor_sync(all, x * 0x100000001ull, 1) >> 32));
  rows.put(__shfl_xor_sync(all, __uint_as_float(x), 1));
  rows.put(__match_any_sync(all, x & 7));
  rows.put(__match_all_sync(all, x >> 3, &equal));
  rows.put(equal);
  rows.put(__match_all_sync(all, blockIdx.x, &equal));
  rows.put(equal);
  rows.put(__reduce_add_sync(all, x));
  rows.put(__reduce_min_sync(all, x));
  rows.put(__reduce_max_sync(all, x));
  rows.put(__reduce_min_sync(all, static_cast<int>(x)));
  rows.put(__reduce_max_sync(all, static_cast<int>(x)));
  rows.put(__reduce_and_sync(all, x));
  rows.put(__reduce_or_sync(half, x));
  rows.put(__reduce_xor_sync(all, x));
  rows.put(__activemask() >> flat_thread() % 32 & 1);
}

__global__ void bits(const uint32_t* in, uint32_t* out, int n) {
  const int i = flat_index();
  const uint32_t x = in[i], y = in[(i + 1) % n];
  const uint64_t wide = static_cast<uint64_t>(y) << 32 | x;
  Rows rows(out, n, i);
  rows.put(__popc(x));
  rows.put(__popcll(wide));
  rows.put(__clz(static_cast<int>(x)));
  rows.put(__clzll(static_cast<long long>(wide)));
  rows.put(__ffs(static_cast<int>(x)));
  rows.put(__ffsll(static_cast<long long>(wide)));
  rows.put(__brev(x));
  rows.put(static_cast<uint32_t>(__brevll(wide)));
  rows.put(__funnelshift_l(x, y, y & 63));
  rows.put(__funnelshift_r(x, y, y & 63));
  rows.put(__funnelshift_lc(x, y, y & 63));
  rows.put(__funnelshift_rc(x, y, y & 63));
  rows.put(__byte_perm(x, y, x ^ y));
  rows.put(__umulhi(x, y));
  rows.put(__mulhi(static_cast<int>(x), static_cast<int>(y)));
  rows.put(static_cast<uint32_t>(__umul64hi(wide, ~wide)));
  rows.put(__dp4a(static_cast<int>(x), static_cast<int>(y), 7));
  rows.put(__vabsdiffu4(x, y));
}

__global__ void floats(const uint32_t* in, uint32_t* out, int n) {
  const int i = flat_index();
  const float a = __uint_as_float(in[i]), b = __int_as_float(static_cast<int>(in[(i + 1) % n]));
  const auto low = static_cast<unsigned short>(in[i]);
  Rows rows(out, n, i);
  rows.put(__fadd_rn(a, b));
  rows.put(__fsub_rn(a, b));
  rows.put(__fmul_rn(a, b));
  rows.put(__fdiv_rn(a, b));
  rows.put(__fsqrt_rn(fabsf(a)));
  rows.put(__fmaf_rn(a, b, a));
  rows.put(__float2int_rn(a));
  rows.put(__float2int_rz(a));
  rows.put(__float2int_rd(a));
  rows.put(__float2int_ru(a));
  rows.put(__float2uint_rn(a));
  rows.put(__int2float_rn(static_cast<int>(in[i])));
  rows.put(__uint2float_rn(in[i]));
  rows.put(__saturatef(a));
  rows.put(__half2float(__ushort_as_half(low)));
  rows.put(uint32_t{__half_as_ushort(__float2half_rn(a))});
  rows.put(__bfloat162float(__ushort_as_bfloat16(low)));
  rows.put(uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(a))});
  rows.put(__half22float2(__floats2half2_rn(1.5f, a)).x);
  rows.put(__fmaf_ru(fabsf(a), 65536.0f, 8388608.0f));
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, 1.0f);
  rows.put(static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 |
           __bfloat16_as_ushort(pair.x));
}

// Each block's threads add to one cell of each kind, in memory and in shared memory.
__global__ void atomics(const uint32_t* in, uint32_t* out, int) {
  __shared__ uint32_t shared[2];
  const uint32_t x = in[flat_index()];
  auto* wide = reinterpret_cast<unsigned long long*>(out);
  if (flat_thread() < 2) shared[flat_thread()] = 0;
  __syncthreads();
  atomicAdd(&shared[0], x);
  atomicMax(&shared[1], x);
  __syncthreads();
  atomicAdd(wide, static_cast<unsigned long long>(x));
  atomicAdd(reinterpret_cast<float*>(out + 2), 0.5f);
  atomicOr(out + 3, x);
  atomicAnd(out + 4, x);
  atomicXor(out + 5, x);
  atomicMin(out + 6, x);
  atomicMin(reinterpret_cast<int*>(out + 7), static_cast<int>(x));
  atomicMax(reinterpret_cast<int*>(out + 8), static_cast<int>(x));
  atomicSub(out + 9, x);
  atomicInc(out + 10, 6u);
  for (uint32_t old = out[0] & 0, seen = ~old; seen != old;) {  // the least, by compare and swap
    seen = old;
    old = atomicCAS(out + 11, seen, x < seen ? x : seen);
  }
  if (flat_thread() == 0) {
    atomicAdd(out + 12, shared[0]);
    atomicMax(out + 13, shared[1]);
    atomicExch(out + 14, 77u);
  }
}

// Barriers that vote, over blocks of three dimensions.
__global__ void blocks(const uint32_t* in, uint32_t* out, int n) {
  const int i = flat_index();
  Rows rows(out, n, i);
  rows.put(__syncthreads_count(in[i] & 1));
  rows.put(__syncthreads_and(in[i] != 3));
  rows.put(__syncthreads_or(in[i] == 3));
  rows.put(threadIdx.x | threadIdx.y << 8 | threadIdx.z << 16);
  rows.put(blockIdx.x | blockIdx.y << 8 | blockIdx.z << 16);
}

// Inclusive sums of all elements in one pass: a block takes its number from a counter and waits for
// the sum of those before it. `state` is a counter, then a flag and a sum for every block.
__global__ void look_back(const uint32_t* in, uint32_t* out, int n, uint32_t* state) {
  PYDIST_DYNAMIC_SHARED(uint32_t, sums);
  __shared__ uint32_t number, before;
  if (threadIdx.x == 0) number = atomicAdd(state, 1u);
  __syncthreads();
  const int i = static_cast<int>(number * blockDim.x + threadIdx.x);
  uint32_t sum = i < n ? in[i] : 0;
  for (unsigned distance = 1; distance < blockDim.x; distance *= 2) {
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= distance) sum += sums[threadIdx.x - distance];
    __syncthreads();
  }
  if (threadIdx.x == blockDim.x - 1) {
    volatile uint32_t* flags = state + 1;
    uint32_t* totals = state + 1 + gridDim.x;
    before = 0;
    if (number) {
      while (flags[number - 1] == 0) continue;
      __threadfence();
      before = totals[number - 1];
    }
    totals[number] = before + sum;
    __threadfence();
    flags[number] = 1;
  }
  __syncthreads();
  if (i < n) out[i] = sum + before;
}

}  // namespace

#define INTRINSICS(kernel)                                                        \
  extern "C" const char* run_##kernel(const uint32_t* in, uint32_t* out, int n) { \
    return launch_test(kernel, dim3(2, 1, 2), dim3(8, 4, 2), 0, in, out, n);      \
  }
INTRINSICS(lanes)
INTRINSICS(bits)
INTRINSICS(floats)
INTRINSICS(atomics)
INTRINSICS(blocks)

extern "C" const char* run_look_back(const uint32_t* in, uint32_t* out, int n, uint32_t* state) {
  const unsigned blocks = static_cast<unsigned>((n + 63) / 64);
  return launch_test(look_back, dim3(blocks), dim3(64), 64 * sizeof(uint32_t), in, out, n, state);
}

// What a launch refuses.
namespace {
__global__ void nothing() {}
}  // namespace
extern "C" const char* run_nothing(unsigned grid, unsigned block, std::size_t shared) {
  return launch_test(nothing, dim3(grid), dim3(block), shared);
}
