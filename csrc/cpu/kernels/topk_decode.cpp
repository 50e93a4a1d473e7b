// topk_select, topk_feedback, topk_reduce, topk_scatter: the largest entries of blocks, over a
// piece of a row.
#include "../simd/convert.h"
#include "../table.h"
#include "topk.h"

namespace pydist::cpu::PYDIST_ISA {

bool decode_positions(const TopKFormat& f, const unsigned char* block, int n, uint32_t* out) {
  const TopKLayout layout = topk_layout(f, n);
  const int bits = f.low_bits == kBitmap ? 0 : f.low_bits;
  const unsigned char* low = block + 4 * layout.low;
  const uint32_t mask = (1u << bits) - 1u;
  int i = 0;
  int64_t previous = -1;
  for (int w = layout.high; w < layout.words; ++w) {
    const int base = (w - layout.high) * kWordBits;
    for (uint32_t ones = load_word(block + 4 * w); ones; ones &= ones - 1) {
      if (i == layout.k) return false;
      const int64_t at = base + __builtin_ctz(ones);
      int64_t position = at;
      if (bits) {
        const int word = i * bits / kWordBits, shift = i * bits % kWordBits;
        uint32_t part = load_word(low + 4 * word) >> shift;
        if (shift + bits > kWordBits) part |= load_word(low + 4 * word + 4) << (kWordBits - shift);
        position = ((at - i) << bits) | (part & mask);
      }
      // What is set behind the stream's end lies beyond the block, too.
      if (position <= previous || position >= n) return false;
      previous = position;
      out[i++] = static_cast<uint32_t>(position);
    }
  }
  if (i != layout.k) return false;
  const int rest = layout.k * bits % kWordBits;
  if (rest && load_word(block + 4 * layout.high - 4) >> rest) return false;
  const bool odd = f.values != DType::kFloat32 && layout.k % 2;
  return !odd || load_word(block + 4 * layout.low - 4) >> 16 == 0;
}

namespace {

// room.dense[0, n) = the sum of all ranks' entries of a block over args.divisor. Returns flags;
// where a rank's bytes are malformed, all is NaN.
uint32_t sum_entries(const TopKDecode& a, const TopKPlace& place, const TopKRoom& room) {
  const int n = place.n, k = topk_entries(a.format, n);
  float* out = room.dense;
  std::memset(out, 0, static_cast<size_t>(n) * sizeof(float));
  const unsigned char* block = a.payload + place.index * topk_block_bytes(a.format);
  for (int64_t r = 0; r < a.ranks; ++r, block += a.stride) {
    if (!decode_positions(a.format, block, n, room.positions)) {
      for (int i = 0; i < n; ++i) out[i] = bits_float(kNanBits);
      return kFlagMalformed | kFlagNonFinite;
    }
    for (int i = 0; i < k; ++i) {
      float* total = out + room.positions[i];
      from_float(*total + decode_value(a.format, block, i), total);  // one NaN only
    }
  }
  if (a.divisor != 1.0f) {
    const Vec divisor = set1(a.divisor);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, div(load(out + i), divisor));
    for (; i < n; ++i) out[i] = out[i] / a.divisor;
  }
  return 0;
}

// x[p] = 0 where the one payload has an entry.
template <typename T>
uint32_t clear_entries(const TopKDecode& a, const TopKPlace& place, const TopKRoom& room, T* x) {
  const unsigned char* block = a.payload + place.index * topk_block_bytes(a.format);
  if (!decode_positions(a.format, block, place.n, room.positions)) return kFlagMalformed;
  const int k = topk_entries(a.format, place.n);
  for (int i = 0; i < k; ++i) std::memset(x + room.positions[i], 0, sizeof(T));
  return 0;
}

// residual = p, less what was sent, where R holds it; p becomes that.
template <typename R>
void keep_unsent(const TopKFormat& f, float* p, int n, const uint32_t* positions, const R* old,
                 R* residual) {
  const int k = topk_entries(f, n);
  for (int i = 0; i < k; ++i) {
    float& x = p[positions[i]];
    x = x - travelled(f.values, x);
  }
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec rest = load(p + i);
    store(residual + i, select(abs_below(rest, FiniteLimit<R>::value), rest, load(old + i)));
  }
  for (; i < n; ++i) keep_one(p[i], old + i, residual + i);
}

}  // namespace

template <typename T>
uint32_t topk_select(const Row& row, const TopKEncode& a, const TopKRoom& room) {
  const T* x = reinterpret_cast<const T*>(row.x);
  TopKGuess guess;
  uint32_t flags = 0;
  for_topk_blocks(row, a.format.block, [&](const TopKPlace& place, int64_t i) {
    flags |= select_block(x + i, place, a, room, &guess);
  });
  return flags;
}

template <typename T, typename R>
uint32_t topk_feedback(const Row& row, const TopKEncode& a, const TopKRoom& room) {
  const T* x = reinterpret_cast<const T*>(row.x);
  const R* old = reinterpret_cast<const R*>(row.momentum);
  R* residual = reinterpret_cast<R*>(row.momentum_out);
  TopKGuess guess;
  uint32_t flags = 0;
  for_topk_blocks(row, a.format.block, [&](const TopKPlace& place, int64_t i) {
    compensate(x + i, old + i, place.n, room.dense, room.other);
    const uint32_t raised = select_block<float>(room.dense, place, a, room, &guess);
    flags |= raised;
    if (!raised) {
      keep_unsent(a.format, room.dense, place.n, room.positions, old + i, residual + i);
    } else if (residual != old) {  // nothing of the block is sent
      std::memcpy(residual + i, old + i, static_cast<size_t>(place.n) * sizeof(R));
    }
  });
  return flags;
}

uint32_t topk_reduce(const Row& row, const TopKDecode& from, const TopKEncode& to,
                     const TopKRoom& room) {
  TopKGuess guess;
  uint32_t flags = 0;
  for_topk_blocks(row, from.format.block, [&](const TopKPlace& place, int64_t) {
    flags |= sum_entries(from, place, room);
    flags |= select_block<float>(room.dense, place, to, room, &guess);
  });
  return flags;
}

template <typename T>
uint32_t topk_scatter(const Row& row, const TopKDecode& a, const TopKRoom& room, bool streams) {
  T* out = reinterpret_cast<T*>(row.x);
  streams = streams && can_stream(out);
  uint32_t flags = 0;
  for_topk_blocks(row, a.format.block, [&](const TopKPlace& place, int64_t i) {
    if (a.clear) {
      flags |= clear_entries(a, place, room, out + i);
      return;
    }
    flags |= sum_entries(a, place, room);
    narrowed(room.dense, place.n, streams, out + i);
  });
  stream_end();
  return flags;
}

template uint32_t topk_select<float>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_select<Half>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_select<BFloat>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_feedback<float, float>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_feedback<Half, float>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_feedback<BFloat, float>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_feedback<float, BFloat>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_feedback<Half, BFloat>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_feedback<BFloat, BFloat>(const Row&, const TopKEncode&, const TopKRoom&);
template uint32_t topk_scatter<float>(const Row&, const TopKDecode&, const TopKRoom&, bool);
template uint32_t topk_scatter<Half>(const Row&, const TopKDecode&, const TopKRoom&, bool);
template uint32_t topk_scatter<BFloat>(const Row&, const TopKDecode&, const TopKRoom&, bool);

}  // namespace pydist::cpu::PYDIST_ISA
