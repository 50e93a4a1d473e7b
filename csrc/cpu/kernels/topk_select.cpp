// select_block: the k largest magnitudes of a block, exactly, in about one pass over memory.
//
// A threshold leaves a few times k candidates, which one pass collects; among them the k-th largest
// is found by counting. The threshold comes from a strided sample (Lin et al., "Deep gradient
// compression", ICLR 2018) and is adapted from block to block. Where it misled, the pass is
// repeated with a lower one, out of the cache: the result is the same whatever the threshold was.
#include "topk.h"

namespace pydist::cpu::PYDIST_ISA {
namespace {

constexpr int kSample = 256;
constexpr int kBins = 256;

template <typename T>
PYDIST_INLINE float value_at(const T* x, int64_t i) {
  T one;
  std::memcpy(&one, x + i, sizeof(T));
  return to_float(one);
}
template <typename T>
PYDIST_INLINE uint32_t magnitude_at(const T* x, int64_t i) {
  return float_bits(value_at(x, i)) & kAbsMask;
}

// The k-th largest of m[0, n), 1 <= k <= n. Numbers are counted in kBins ranges of equal width; the
// range that holds the answer is divided again. `work` has room for n.
uint32_t kth_largest(const uint32_t* m, int n, int k, uint32_t* work) {
  for (;;) {
    uint32_t low = m[0], high = m[0];
    for (int i = 1; i < n; ++i) {
      low = m[i] < low ? m[i] : low;
      high = m[i] > high ? m[i] : high;
    }
    const uint32_t range = high - low;
    if (range == 0) return low;
    const int width = 32 - __builtin_clz(range);
    const int shift = width > 8 ? width - 8 : 0;
    int count[kBins] = {};
    for (int i = 0; i < n; ++i) ++count[(m[i] - low) >> shift];
    int bin = kBins - 1;
    for (; k > count[bin]; --bin) k -= count[bin];
    if (shift == 0) return low + static_cast<uint32_t>(bin);
    int kept = 0;
    for (int i = 0; i < n; ++i) {  // m may be work: what is read is never behind what is written
      const uint32_t one = m[i];
      work[kept] = one;
      kept += (one - low) >> shift == static_cast<uint32_t>(bin) ? 1 : 0;
    }
    m = work;
    n = kept;
  }
}

// Positions of magnitudes of at least `limit`, ascending. May write kLanes numbers past the last.
// Where they are few, words without any are skipped; else that would be a coin toss for the
// processor at every word.
template <typename T>
int collect(const T* x, int n, uint32_t limit, bool few, uint32_t* out) {
  constexpr int kVecs = kWordBits / kLanes;
  int count = 0, i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    walks_word(x + i);
    Mask below[kVecs];
    Mask all = mask_from(kLaneMask);
    for (int j = 0; j < kVecs; ++j) {
      below[j] = abs_below(load(x + i + j * kLanes), limit);
      all = both(all, below[j]);
    }
    if (few && bits_of(all) == kLaneMask) continue;
    for (int j = 0; j < kVecs; ++j) {
      count += store_places(out + count, bits_of(below[j]) ^ kLaneMask,
                            static_cast<uint32_t>(i + j * kLanes));
    }
  }
  for (; i < n; ++i) {
    out[count] = static_cast<uint32_t>(i);
    count += magnitude_at(x, i) >= limit ? 1 : 0;
  }
  return count;
}

// A magnitude that a few times k of the n elements reach, by a sample; at least the smallest
// subnormal number, so that zeros are no candidates.
template <typename T>
uint32_t sampled_limit(const T* x, int n, int k, const TopKRoom& room) {
  const int stride = (n / kSample - 1) | 1;  // odd: the rows of a matrix are often powers of two
  for (int i = 0; i < kSample; ++i) room.magnitudes[i] = magnitude_at(x, int64_t{i} * stride);
  const int expected = static_cast<int>(int64_t{kSample} * k / n);
  int spread = 0;  // about three standard deviations
  while (spread * spread < 9 * expected) ++spread;
  const int rank = expected + spread + 3;
  if (rank > kSample) return 1;
  const uint32_t limit = kth_largest(room.magnitudes, kSample, rank, room.work);
  return limit ? limit : 1;
}

// Magnitudes of the candidates; returns the largest.
template <typename T>
uint32_t gather(const T* x, int count, const TopKRoom& room) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t m = magnitude_at(x, room.positions[i]);
    room.magnitudes[i] = m;
    most = m > most ? m : most;
  }
  return most;
}

// Keeps the k candidates that are selected, in order: those above the threshold, and some of those
// that equal it.
void keep(int count, int k, uint32_t threshold, int turn, const TopKRoom& room) {
  TopKTies ties = {turn, k, 0, 0};
  for (int i = 0; i < count; ++i) {
    ties.wanted -= room.magnitudes[i] > threshold ? 1 : 0;
    ties.ties += room.magnitudes[i] == threshold ? 1 : 0;
  }
  int kept = 0;
  if (ties.wanted == ties.ties) {  // as almost always
    for (int i = 0; i < count; ++i) {
      room.positions[kept] = room.positions[i];
      kept += room.magnitudes[i] >= threshold ? 1 : 0;
    }
    return;
  }
  for (int i = 0; i < count && static_cast<int>(room.positions[i]) < turn; ++i) {
    ties.below += room.magnitudes[i] == threshold ? 1 : 0;
  }
  int number = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t position = room.positions[i];
    const bool tied = room.magnitudes[i] == threshold;
    const bool taken =
        tied ? takes_tie(ties, static_cast<int>(position), number) : room.magnitudes[i] > threshold;
    number += tied ? 1 : 0;
    room.positions[kept] = position;
    kept += taken ? 1 : 0;
  }
}

// The limit for the next block: such that about two or three times k elements reach it.
void learn(int count, int k, uint32_t limit, uint32_t threshold, TopKGuess* guess) {
  uint32_t margin = threshold - limit;
  margin = count > 3 * k ? margin - margin / 4 : count < 2 * k ? margin + margin / 2 + 1 : margin;
  guess->margin = margin;
  guess->limit = margin < threshold ? threshold - margin : 1;
}

// Leaves the positions of the k largest in room.positions. False where not all values are finite.
template <typename T>
bool find(const T* x, int n, int k, int turn, const TopKRoom& room, TopKGuess* guess) {
  const bool sampled = n >= 4 * kSample && 4 * k < n;
  uint32_t limit = !sampled ? 0 : guess->limit ? guess->limit : sampled_limit(x, n, k, room);
  const bool few = 512 * k < n;
  int count = collect(x, n, limit, few, room.positions);
  if (sampled && guess->limit && (count < k || count > n / 4)) {  // misled by the block before
    limit = sampled_limit(x, n, k, room);
    count = collect(x, n, limit, few, room.positions);
  }
  if (count < k && limit > 1) {
    limit = 1;
    count = collect(x, n, limit, few, room.positions);
  }
  *guess = TopKGuess{};
  if (gather(x, count, room) >= kInfBits) return false;
  uint32_t threshold = 0;
  if (count >= k) {
    threshold = kth_largest(room.magnitudes, count, k, room.work);
    if (sampled) learn(count, k, limit, threshold, guess);
  } else {  // fewer are not zero: zeros are the ties
    count = collect(x, n, 0, false, room.positions);
    gather(x, count, room);
  }
  keep(count, k, threshold, turn, room);
  return true;
}

// ------------------------------------------------------------ bytes

template <typename T>
void write_values(const TopKFormat& f, const T* x, const uint32_t* positions, int k,
                  unsigned char* out) {
  for (int i = 0; i < k; ++i) {
    const float v = x ? value_at(x, positions[i]) : bits_float(kNanBits);
    if (f.values == DType::kFloat32) {
      store_word(out + 4 * i, float_bits(v));
    } else {
      const auto bits =
          static_cast<uint16_t>(f.values == DType::kFloat16 ? held_half(v) : held_bfloat(v));
      std::memcpy(out + 2 * i, &bits, sizeof(bits));
    }
  }
  if (f.values != DType::kFloat32 && k % 2) std::memset(out + 2 * k, 0, 2);
}

void write_positions(const TopKFormat& f, const TopKLayout& layout, const uint32_t* positions,
                     unsigned char* block) {
  const bool bitmap = f.low_bits == kBitmap;
  const int bits = bitmap ? 0 : f.low_bits;
  unsigned char* low = block + 4 * layout.low;
  unsigned char* high = block + 4 * layout.high;
  std::memset(high, 0, static_cast<size_t>(4 * (layout.words - layout.high)));
  uint64_t pending = 0;
  int filled = 0;
  for (int i = 0; i < layout.k; ++i) {
    const uint32_t p = positions[i];
    const uint32_t at = bitmap ? p : (p >> bits) + static_cast<uint32_t>(i);
    high[at / 8] = static_cast<unsigned char>(high[at / 8] | 1u << (at % 8));
    pending |= static_cast<uint64_t>(p & ((1u << bits) - 1u)) << filled;
    filled += bits;
    if (filled >= 32) {
      store_word(low, static_cast<uint32_t>(pending));
      low += 4, pending >>= 32, filled -= 32;
    }
  }
  if (filled) store_word(low, static_cast<uint32_t>(pending));
}

}  // namespace

template <typename T>
uint32_t select_block(const T* x, const TopKPlace& place, const TopKEncode& a, const TopKRoom& room,
                      TopKGuess* guess) {
  const TopKLayout layout = topk_layout(a.format, place.n);
  const int turn = topk_turn(a.seed, a.step, place.ordinal, place.number, place.n);
  const bool finite = find(x, place.n, layout.k, turn, room, guess);
  if (!finite) {
    for (int i = 0; i < layout.k; ++i) room.positions[i] = static_cast<uint32_t>(i);
  }
  const int64_t size = topk_block_bytes(a.format);
  const int64_t begin = place.index * size;
  const int64_t left = a.bytes - begin < size ? a.bytes - begin : size;  // with padding
  unsigned char* out = a.payload + begin;
  write_values(a.format, finite ? x : nullptr, room.positions, layout.k, out);
  write_positions(a.format, layout, room.positions, out);
  std::memset(out + 4 * layout.words, 0, static_cast<size_t>(left - 4 * layout.words));
  return finite ? 0u : kFlagNonFinite;
}

template uint32_t select_block<float>(const float*, const TopKPlace&, const TopKEncode&,
                                      const TopKRoom&, TopKGuess*);
template uint32_t select_block<Half>(const Half*, const TopKPlace&, const TopKEncode&,
                                     const TopKRoom&, TopKGuess*);
template uint32_t select_block<BFloat>(const BFloat*, const TopKPlace&, const TopKEncode&,
                                       const TopKRoom&, TopKGuess*);

}  // namespace pydist::cpu::PYDIST_ISA
