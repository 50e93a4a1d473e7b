// A block's k largest entries as bytes: which they are as a bitmap in shared memory, whose ones
// number them, then their values and positions.
#pragma once

#include "topk_threshold.cuh"

namespace pydist::cuda {

// ------------------------------------------------------------ which entries

// Calls body(w, before) for this thread's words of a bitmap, in order; `before` is the number of
// ones before word w. All threads call it together.
template <typename Body>
PYDIST_DEVICE void number_words(const uint32_t* bitmap, int words, TopKShared* s,
                                const Body& body) {
  constexpr int kEach = kBitmapWords / kBlockThreads;
  const int first = kEach * thread_id();
  uint32_t sum = 0, total;
#pragma unroll
  for (int w = first; w < first + kEach; ++w) sum += w < words ? __popc(bitmap[w]) : 0;
  uint32_t before = sum_before(sum, s, &total);
#pragma unroll 1
  for (int w = first; w < first + kEach && w < words; ++w) {
    const uint32_t ones = static_cast<uint32_t>(__popc(bitmap[w]));
    body(w, before);
    before += ones;
  }
}

// Sets the bits of candidates above the threshold, and those of ties, in a bitmap of their own
// where not all are taken.
PYDIST_DEVICE void mark_candidates(const Threshold& t, int count, int words, TopKShared* s) {
  for (int w = thread_id(); w < words; w += kBlockThreads) s->taken[w] = 0, s->bins[w] = 0;
  __syncthreads();
  for (int c = thread_id(); c < count; c += kBlockThreads) {
    const uint32_t m = float_bits(s->values[c]) & kAbsMask;
    const int place = s->places[c];
    uint32_t* bitmap = m > t.magnitude || t.all_ties() ? s->taken : s->bins;
    if (m >= t.magnitude) atomicOr(&bitmap[place / kWordBits], 1u << (place % kWordBits));
  }
}

// The same of all elements, a run's bits at a time.
template <typename Source>
PYDIST_DEVICE void mark_runs(const Source& x, int n, const Threshold& t, int words, TopKShared* s) {
  auto* taken = reinterpret_cast<unsigned char*>(s->taken);
  auto* ties = reinterpret_cast<unsigned char*>(s->bins);
#pragma unroll 1
  for (int i = kRun * thread_id(); i < words * kWordBits; i += kTile) {
    Run v = {};
    if (i < n) x.run(i, v);
    uint32_t greater = 0, tied = 0;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t m = float_bits(v[j]) & kAbsMask;
      greater |= i + j < n && m > t.magnitude ? 1u << j : 0u;
      tied |= i + j < n && m == t.magnitude ? 1u << j : 0u;
    }
    taken[i / kRun] = static_cast<unsigned char>(t.all_ties() ? greater | tied : greater);
    ties[i / kRun] = static_cast<unsigned char>(tied);
  }
}

// Adds the ties that are taken, then leaves in bins the number of entries before each word.
PYDIST_DEVICE void number_entries(const Threshold& t, int words, TopKShared* s) {
  __syncthreads();  // all bits are set
  if (!t.all_ties()) {
    number_words(s->bins, words, s, [&](int w, uint32_t before) {
      int number = static_cast<int>(before);
#pragma unroll 1
      for (uint32_t rest = s->bins[w]; rest; rest &= rest - 1, ++number) {
        const int bit = __ffs(static_cast<int>(rest)) - 1;
        if (takes_tie(t.ties, w * kWordBits + bit, number)) s->taken[w] |= 1u << bit;
      }
    });
  }
  number_words(s->taken, words, s, [&](int w, uint32_t before) { s->bins[w] = before; });
  __syncthreads();
}

// ------------------------------------------------------------ bytes

// Entry i of a block: its value, and its position in the shared words.
PYDIST_DEVICE void put_entry(const TopKFormat& f, const TopKLayout& layout, unsigned char* block,
                             TopKShared* s, int i, int position, float value) {
  if (f.values == DType::kFloat32) {
    store_word(block + 4 * i, float_bits(value));
  } else {
    const uint32_t bits = f.values == DType::kFloat16 ? held_half(value) : held_bfloat(value);
    block[2 * i] = static_cast<unsigned char>(bits);
    block[2 * i + 1] = static_cast<unsigned char>(bits >> 8);
  }
  const auto p = static_cast<uint32_t>(position);
  uint32_t at = p;
  if (f.low_bits != kBitmap) {
    const uint32_t part = p & ((1u << f.low_bits) - 1u);
    const int first = i * f.low_bits, word = first / kWordBits, shift = first % kWordBits;
    atomicOr(&s->words[word], part << shift);
    if (shift + f.low_bits > kWordBits) {
      atomicOr(&s->words[word + 1], part >> (kWordBits - shift));
    }
    at = (p >> f.low_bits) + static_cast<uint32_t>(i);
  }
  atomicOr(&s->words[layout.high - layout.low + static_cast<int>(at) / kWordBits],
           1u << (at % kWordBits));
}

// The number of an entry that is taken, or of the next.
PYDIST_DEVICE int entry_number(const TopKShared* s, int place) {
  const uint32_t below = (1u << (place % kWordBits)) - 1u;
  const int word = place / kWordBits;
  return static_cast<int>(s->bins[word]) + __popc(s->taken[word] & below);
}

PYDIST_DEVICE void put_candidates(int count, const TopKFormat& f, const TopKLayout& layout,
                                  unsigned char* block, TopKShared* s) {
  for (int c = thread_id(); c < count; c += kBlockThreads) {
    const int place = s->places[c];
    if ((s->taken[place / kWordBits] >> (place % kWordBits) & 1u) == 0) continue;
    put_entry(f, layout, block, s, entry_number(s, place), place, s->values[c]);
  }
}

struct TopKKeepNothing {
  PYDIST_DEVICE_MEMBER void operator()(int, uint32_t) const {}
};

// Calls kept(i, taken) for every run, too: from the end, as what was read last is still cached.
template <typename Source, typename Kept>
PYDIST_DEVICE void put_runs(const Source& x, const TopKFormat& f, const TopKLayout& layout,
                            unsigned char* block, TopKShared* s, const Kept& kept) {
#pragma unroll 1
  for (int base = (layout.n - 1) / kTile * kTile; base >= 0; base -= kTile) {
    const int i = base + kRun * thread_id();
    if (i >= layout.n) continue;
    const uint32_t taken = s->taken[i / kWordBits] >> (i % kWordBits) & ((1u << kRun) - 1u);
    int number = entry_number(s, i);
#pragma unroll 1
    for (uint32_t rest = taken; rest; rest &= rest - 1, ++number) {
      const int place = i + __ffs(static_cast<int>(rest)) - 1;
      put_entry(f, layout, block, s, number, place, x.one(place));
    }
    kept(i, taken);
  }
}

// ------------------------------------------------------------ a block

// Stores the values of a block, and its positions in shared memory. Returns whether it is finite.
template <typename Source, typename Kept>
PYDIST_DEVICE bool put_largest(const Source& x, const TopKFormat& f, const TopKLayout& layout,
                               int turn, unsigned char* block, TopKShared* s, const Kept& kept) {
  const int n = layout.n, bitmap = static_cast<int>(words_for(n));
  const int count = find_candidates(x, n, layout.k, s);
  const Threshold t = count ? find_threshold(Candidates{s, count}, count, layout.k, turn, s)
                            : find_threshold(x, n, layout.k, turn, s);
  if (!t.finite) {
    for (int i = thread_id(); i < layout.k; i += kBlockThreads) {
      put_entry(f, layout, block, s, i, i, bits_float(kNanBits));
    }
    return false;
  }
  if (count) {
    mark_candidates(t, count, bitmap, s);
  } else {
    mark_runs(x, n, t, bitmap, s);
  }
  number_entries(t, bitmap, s);
  if (count && std::is_same<Kept, TopKKeepNothing>::value) {
    put_candidates(count, f, layout, block, s);
  } else {
    put_runs(x, f, layout, block, s, kept);
  }
  return true;
}

// Encodes one block; with kept, tells of its runs if it is finite. All threads call it together.
// Returns whether the block is finite.
template <typename Source, typename Kept>
PYDIST_DEVICE bool select_block(const Source& x, const TopKEncode& a, const Row& row, int64_t index,
                                int64_t begin, int n, TopKShared* s, const Kept& kept) {
  const TopKFormat& f = a.format;
  const TopKLayout layout = topk_layout(f, n);
  const int index_words = layout.words - layout.low;
  for (int w = thread_id(); w < index_words; w += kBlockThreads) s->words[w] = 0;
  __syncthreads();
  const int turn = topk_turn(a.seed, static_cast<uint32_t>(step_of(a)), row.ordinal,
                             (row.first + begin) / f.block, n);
  const int64_t size = topk_block_bytes(f);
  const int64_t left = a.bytes - index * size;
  unsigned char* block = a.payload + index * size;
  const bool finite = put_largest(x, f, layout, turn, block, s, kept);
  if (thread_id() < 2 && f.values != DType::kFloat32 && layout.k % 2) {
    block[2 * layout.k + thread_id()] = 0;
  }
  __syncthreads();
  const int room = static_cast<int>((left < size ? left : size) / 4);
  for (int w = layout.low + thread_id(); w < room; w += kBlockThreads) {
    store_word(block + 4 * w, w < layout.words ? s->words[w - layout.low] : 0u);
  }
  return finite;
}

}  // namespace pydist::cuda
