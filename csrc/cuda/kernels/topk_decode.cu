// topk_scatter and topk_reduce: what all ranks sent for a block, added in rank order and divided
// once; written as values, or selected from again. A payload is checked before it is used.
#include "topk_entries.cuh"

namespace pydist::cuda {
namespace {

// The entries of one rank's block. `word` of the high bits holds entries from `first` on.
struct Entries {
  TopKFormat f;
  TopKLayout layout;
  const unsigned char* block;

  PYDIST_DEVICE_MEMBER uint32_t low(int i) const {
    const unsigned char* stream = block + 4 * layout.low;
    const int word = i * f.low_bits / kWordBits, shift = i * f.low_bits % kWordBits;
    uint32_t part = load_word(stream + 4 * word) >> shift;
    if (shift + f.low_bits > kWordBits) {
      part |= load_word(stream + 4 * word + 4) << (kWordBits - shift);
    }
    return part & ((1u << f.low_bits) - 1u);
  }

  // Position of entry i, whose 1 is bit `at` of the high bits.
  PYDIST_DEVICE_MEMBER int64_t position(int i, int at) const {
    if (f.low_bits == kBitmap) return at;
    return static_cast<int64_t>(at - i) << f.low_bits | low(i);
  }

  PYDIST_DEVICE_MEMBER float value(int i) const {
    if (f.values == DType::kFloat32) return bits_float(load_word(block + 4 * i));
    const auto bits = static_cast<uint16_t>(block[2 * i] | block[2 * i + 1] << 8);
    return f.values == DType::kFloat16 ? to_float(Half{bits}) : to_float(BFloat{bits});
  }

  // Calls visit(i, at, neighbour) for this thread's entries, where `neighbour` says that the bit
  // before is set too; returns the number of ones of all threads.
  template <typename Visit>
  PYDIST_DEVICE_MEMBER uint32_t walk(TopKShared* s, const Visit& visit) const {
    const int count = layout.words - layout.high;
    uint32_t before = 0;
#pragma unroll 1
    for (int base = 0; base < count; base += kBlockThreads) {
      const int w = base + thread_id();
      const unsigned char* stream = block + 4 * layout.high;
      const uint32_t ones = w < count ? load_word(stream + 4 * w) : 0u;
      const uint32_t last = w > 0 && w < count ? load_word(stream + 4 * w - 4) >> 31 : 0u;
      uint32_t total;
      int i = static_cast<int>(before + sum_before(__popc(ones), s, &total));
#pragma unroll 1
      for (uint32_t rest = ones; rest && i < layout.k; rest &= rest - 1, ++i) {
        const int bit = __ffs(static_cast<int>(rest)) - 1;
        visit(i, w * kWordBits + bit, bit ? (ones >> (bit - 1) & 1u) != 0 : last != 0);
      }
      before += total;
    }
    return before;
  }

  // Whether no encoder writes such bytes. All threads call it together, and get one answer.
  PYDIST_DEVICE_MEMBER bool malformed(TopKShared* s) const {
    bool bad = false;
    const bool bitmap = f.low_bits == kBitmap;
    const uint32_t ones = walk(s, [&](int i, int at, bool neighbour) {
      // Entries with the same high bits stand beside each other; others ascend anyway.
      bad = bad || position(i, at) >= layout.n || (!bitmap && neighbour && low(i) <= low(i - 1));
    });
    bad = bad || ones != static_cast<uint32_t>(layout.k);
    const int rest = bitmap ? 0 : layout.k * f.low_bits % kWordBits;
    if (rest) bad = bad || load_word(block + 4 * layout.high - 4) >> rest;
    const bool odd = f.values != DType::kFloat32 && layout.k % 2;
    if (odd) bad = bad || load_word(block + 4 * layout.low - 4) >> 16;
    return __syncthreads_or(bad) != 0;
  }
};

PYDIST_DEVICE Entries entries_of(const TopKDecode& a, int64_t index, int n, int64_t rank) {
  return {a.format, topk_layout(a.format, n),
          a.payload + rank * a.stride + index * topk_block_bytes(a.format)};
}

// out[0, n) = the sum of all ranks' entries over the divisor; NaN where bytes are malformed.
// Returns whether they were.
PYDIST_DEVICE bool sum_entries(const TopKDecode& a, int64_t index, int n, TopKShared* s,
                               float* out) {
  for (int i = thread_id(); i < n; i += kBlockThreads) out[i] = 0.0f;
  bool bad = false;
#pragma unroll 1
  for (int64_t r = 0; r < a.ranks && !bad; ++r) {
    const Entries e = entries_of(a, index, n, r);
    bad = e.malformed(s);  // a barrier, too
    if (bad) break;
    e.walk(s, [&](int i, int at, bool) {
      float* total = out + e.position(i, at);
      narrow(*total + e.value(i), total);
    });
    __syncthreads();
  }
  for (int i = thread_id(); i < n; i += kBlockThreads) {
    out[i] = bad ? bits_float(kNanBits) : out[i] / a.divisor;
  }
  __syncthreads();
  return bad;
}

// One rank's entries straight into the result.
template <typename T>
PYDIST_DEVICE bool one_rank(const TopKDecode& a, int64_t index, int n, TopKShared* s, T* out) {
  const Entries e = entries_of(a, index, n, 0);
  const bool bad = e.malformed(s);
  if (a.clear && bad) return true;
  if (!a.clear) {
    T fill;
    narrow(bad ? bits_float(kNanBits) : 0.0f, &fill);
    for (int i = thread_id(); i < n; i += kBlockThreads) out[i] = fill;
    if (bad) return true;
  }
  __syncthreads();
  e.walk(s, [&](int i, int at, bool) {
    const float value = a.clear ? 0.0f : (0.0f + e.value(i)) / a.divisor;
    narrow(value, out + e.position(i, at));
  });
  return false;
}

PYDIST_DEVICE float* slot_of(const TopKSlots& slots, int block) {
  return slots.room + static_cast<int64_t>(blockIdx.x) * block;
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    topk_scatter_kernel(Rows rows, TopKDecode a, uint32_t* flags, TopKSlots slots) {
  __shared__ TopKShared s;
  for_topk_blocks(rows, a.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
    T* out = device_pointer<T>(row.x) + begin;
    bool bad;
    if (a.ranks == 1) {
      bad = one_rank(in_message(a, row), index, n, &s, out);
    } else {
      float* sum = slot_of(slots, a.format.block);
      bad = sum_entries(a, index, n, &s, sum);
      for (int i = thread_id(); i < n; i += kBlockThreads) narrow(sum[i], out + i);
    }
    raise_topk(flags, bad ? kFlagMalformed | (a.clear ? 0u : kFlagNonFinite) : 0u);
  });
}

__global__ void __launch_bounds__(kBlockThreads, 2)
    topk_reduce_kernel(Rows rows, TopKDecode from, TopKEncode to, uint32_t* flags,
                       TopKSlots slots) {
  __shared__ TopKShared s;
  for_topk_blocks(
      rows, from.format.block, [&](const Row& row, int64_t index, int64_t begin, int n) {
        float* sum = slot_of(slots, from.format.block);
        const bool bad = sum_entries(from, index, n, &s, sum);
        const Plain<float> x = {sum, n, true};
        const bool finite =
            select_block(x, in_message(to, row), row, index, begin, n, &s, TopKKeepNothing{});
        raise_topk(flags, (bad ? kFlagMalformed : 0u) | (finite ? 0u : kFlagNonFinite));
      });
}

}  // namespace

void topk_scatter(const Rows& rows, DType dtype, const TopKDecode& args, uint32_t* flags,
                  const TopKSlots& slots, void* stream) {
  const int64_t most = args.ranks == 1 ? rows.words : slots.count;
  const auto launch_one = [&](auto kernel) {
    launch_topk("topk_scatter", kernel, rows, most, stream, args, flags, slots);
  };
  switch (dtype) {
    case DType::kFloat32:
      return launch_one(topk_scatter_kernel<float>);
    case DType::kFloat16:
      return launch_one(topk_scatter_kernel<Half>);
    case DType::kBFloat16:
      return launch_one(topk_scatter_kernel<BFloat>);
  }
}

void topk_reduce(const Rows& rows, const TopKDecode& from, const TopKEncode& to, uint32_t* flags,
                 const TopKSlots& slots, void* stream) {
  launch_topk("topk_reduce", topk_reduce_kernel, rows, slots.count, stream, from, to, flags, slots);
}

}  // namespace pydist::cuda
