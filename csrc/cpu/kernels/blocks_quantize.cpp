// quantize, quantize_feedback, reduce_quantized, dequantize: block formats over a piece of a row.
#include "../simd/convert.h"
#include "../simd/warp_order.h"
#include "../table.h"
#include "blocks.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

WidePhilox draws_of(const EncodeArgs& a, const Row& row) {
  return WidePhilox({a.seed, a.key1, a.step, static_cast<uint32_t>(row.ordinal)});
}

}  // namespace

// The largest magnitude of the next block is looked for before this one is coded, so that neither
// waits for the other.
template <typename T>
uint32_t quantize(const Row& row, const EncodeArgs& a, float* scratch) {
  struct Ready {
    const float* x;
    uint32_t largest;
  };
  const T* x = reinterpret_cast<const T*>(row.x);
  const int block = a.format.block;
  const WidePhilox philox = draws_of(a, row);
  const auto ready = [&](int64_t i, float* room) {
    const int n = static_cast<int>(row.n - i < block ? row.n - i : block);
    const float* wide = widened(x + i, n, room);
    return Ready{wide, largest_magnitude(wide, n)};
  };
  float* room = scratch;
  Ready next = ready(0, room);
  uint32_t flags = 0;
  for_blocks(row, block, [&](const BlockPlace& place, int64_t i) {
    const Ready now = next;
    room = room == scratch ? scratch + block : scratch;
    if (i + block < row.n) next = ready(i + block, room);
    flags |= encode_block(now.x, now.largest, place, a, philox);
  });
  return flags;
}

template <typename T, typename R>
uint32_t quantize_feedback(const Row& row, const EncodeArgs& a, float* scratch) {
  const T* x = reinterpret_cast<const T*>(row.x);
  const R* old = reinterpret_cast<const R*>(row.momentum);
  R* residual = reinterpret_cast<R*>(row.momentum_out);
  float* p = scratch;
  float* sent = scratch + a.format.block;
  const WidePhilox philox = draws_of(a, row);
  uint32_t flags = 0;
  for_blocks(row, a.format.block, [&](const BlockPlace& place, int64_t i) {
    compensate(x + i, old + i, place.n, p, sent);
    const uint32_t raised = encode_block(p, largest_magnitude(p, place.n), place, a, philox);
    flags |= raised;
    if (raised) {  // nothing of the block is sent
      if (residual != old) std::memcpy(residual + i, old + i, place.n * sizeof(R));
      return;
    }
    decode_block<Put::kStore>(a.format, a.codes + place.index * block_bytes(a.format),
                              a.scales + 4 * place.index, place.n, sent);
    keep_rest(p, sent, place.n, old + i, residual + i);
  });
  return flags;
}

uint32_t reduce_quantized(const Row& row, const DecodeArgs& from, const EncodeArgs& to,
                          float* scratch) {
  const WidePhilox philox = draws_of(to, row);
  uint32_t flags = 0;
  for_blocks(row, from.format.block, [&](const BlockPlace& place, int64_t) {
    sum_block(from, place.index, place.n, scratch);
    flags |= encode_block(scratch, largest_magnitude(scratch, place.n), place, to, philox);
  });
  return flags;
}

// One rank's float32 values need no further step and go where they belong at once.
PYDIST_INLINE bool put_at_once(const DecodeArgs& a, int64_t index, int n, bool streams,
                               float* out) {
  if (a.ranks != 1 || a.divisor != 1.0f) return false;
  const unsigned char* codes = a.codes + index * block_bytes(a.format);
  const auto put = streams ? decode_block<Put::kStream> : decode_block<Put::kStore>;
  put(a.format, codes, a.scales + 4 * index, n, out);
  return true;
}
template <typename T>
PYDIST_INLINE bool put_at_once(const DecodeArgs&, int64_t, int, bool, T*) {
  return false;
}

template <typename T>
void dequantize(const Row& row, const DecodeArgs& a, float* scratch, bool streams) {
  T* out = reinterpret_cast<T*>(row.x);
  streams = streams && can_stream(out);
  for_blocks(row, a.format.block, [&](const BlockPlace& place, int64_t i) {
    if (put_at_once(a, place.index, place.n, streams, out + i)) return;
    sum_block(a, place.index, place.n, scratch);
    narrowed(scratch, place.n, streams, out + i);
  });
  stream_end();
}

template uint32_t quantize<float>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize<Half>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize<BFloat>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize_feedback<float, float>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize_feedback<Half, float>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize_feedback<BFloat, float>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize_feedback<float, BFloat>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize_feedback<Half, BFloat>(const Row&, const EncodeArgs&, float*);
template uint32_t quantize_feedback<BFloat, BFloat>(const Row&, const EncodeArgs&, float*);
template void dequantize<float>(const Row&, const DecodeArgs&, float*, bool);
template void dequantize<Half>(const Row&, const DecodeArgs&, float*, bool);
template void dequantize<BFloat>(const Row&, const DecodeArgs&, float*, bool);

}  // namespace pydist::cpu::PYDIST_ISA
