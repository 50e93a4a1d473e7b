// How large the k-th largest magnitude of a block is, by counting digits (a radix selection).
//
// To count the digits of all elements is to read them three times. So the threshold is first
// guessed from a sample, and one read collects what is above the guess: where that is k elements or
// more, and no more than shared memory has room for, the k largest are among them, and only they
// are counted. Else all elements are: the answer is the same.
#pragma once

#include "topk.cuh"

namespace pydist::cuda {

// ------------------------------------------------------------ digits

// A magnitude's 31 bits are digits of 11, 10 and 10 bits.
constexpr int kFirstShift = 20;
constexpr int kDigitBits = 10;
constexpr int kBinsEach = kBins / kBlockThreads;

// The digit from `shift` on that the wanted-th largest magnitude has, among those whose higher bits
// are `prefix`. Leaves bin, above, inside; and of the first digit, infinite.
template <typename Source>
PYDIST_DEVICE void find_digit(const Source& x, int n, int shift, uint32_t prefix, uint32_t wanted,
                              TopKShared* s) {
  const int width = shift == kFirstShift ? kDigitBits + 1 : kDigitBits;
  for (int b = thread_id(); b < kBins; b += kBlockThreads) s->bins[b] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = kRun * thread_id(); i < n; i += kTile) {
    Run v;
    x.run(i, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const uint32_t m = float_bits(v[j]) & kAbsMask;
      if (i + j < n && m >> (shift + width) == prefix) {
        atomicAdd(&s->bins[(m >> shift) & ((1u << width) - 1u)], 1u);
      }
    }
  }
  __syncthreads();
  const int top = kBins - 1 - kBinsEach * thread_id();  // this thread's bins, downwards
  uint32_t sum = 0, total;
#pragma unroll
  for (int b = 0; b < kBinsEach; ++b) sum += s->bins[top - b];
  uint32_t above = sum_before(sum, s, &total);
  if (above < wanted && wanted <= above + sum) {
    int b = top;
    for (; above + s->bins[b] < wanted; --b) above += s->bins[b];
    s->bin = static_cast<uint32_t>(b);
    s->above = above;
    s->inside = s->bins[b];
  }
  static_assert(kBins - kBinsEach == kInfBits >> kFirstShift, "the first thread has these bins");
  if (shift == kFirstShift && thread_id() == 0) s->infinite = sum;
  __syncthreads();
}

// The digits of the wanted-th largest magnitude down to the one at `last`.
struct Magnitude {
  bool finite;  // all elements are; else nothing else is known
  uint32_t digits;
  uint32_t wanted, ties;  // how many of those with these digits are wanted, and how many there are
};

template <typename Source>
PYDIST_DEVICE Magnitude find_magnitude(const Source& x, int n, int wanted, int last,
                                       TopKShared* s) {
  Magnitude found = {true, 0u, static_cast<uint32_t>(wanted), 0u};
#pragma unroll 1
  for (int shift = kFirstShift; shift >= last && found.finite; shift -= kDigitBits) {
    find_digit(x, n, shift, found.digits, found.wanted, s);
    found.digits = found.digits << kDigitBits | s->bin;
    found.wanted -= s->above;
    found.ties = s->inside;
    found.finite = s->infinite == 0;
    __syncthreads();  // before the next digit is written
  }
  return found;
}

// ------------------------------------------------------------ candidates

// Elements of the list, in any order.
struct Candidates {
  const TopKShared* s;
  int n;

  PYDIST_DEVICE_MEMBER void run(int i, Run& v) const {
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = i + j < n ? s->values[i + j] : 0.0f;
  }
};

// Where element i of a source is in its block.
template <typename Source>
PYDIST_DEVICE int place_of(const Source&, int i) {
  return i;
}
PYDIST_DEVICE int place_of(const Candidates& x, int i) { return x.s->places[i]; }

// Runs of consecutive tiles, loaded at once and as they are stored.
template <typename Source>
struct Batch;

template <typename T>
struct Batch<Plain<T>> {
  static constexpr int kRuns = 4;
  T raw[kRuns][kRun];

  // Whether elements below `end` can be loaded so: all are there, and aligned.
  PYDIST_DEVICE_MEMBER static bool fits(const Plain<T>& x, int end) {
    return x.vector && end <= x.n;
  }
  PYDIST_DEVICE_MEMBER void load(const Plain<T>& x, int i, int runs = kRuns) {
#pragma unroll
    for (int b = 0; b < kRuns; ++b) {
      if (b < runs) load_run<T, kRun, true>(x.x, i + b * kTile, x.n, raw[b]);
    }
  }
  PYDIST_DEVICE_MEMBER void run(int b, Run& v) const {
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = widen(raw[b][j]);
  }
};

template <typename T, typename R>
struct Batch<Compensated<T, R>> {
  static constexpr int kRuns = 2;
  Batch<Plain<T>> x;
  Batch<Plain<R>> residual;

  PYDIST_DEVICE_MEMBER static bool fits(const Compensated<T, R>& source, int end) {
    return Batch<Plain<T>>::fits(source.x, end) && Batch<Plain<R>>::fits(source.residual, end);
  }
  PYDIST_DEVICE_MEMBER void load(const Compensated<T, R>& source, int i) {
    x.load(source.x, i, kRuns);
    residual.load(source.residual, i, kRuns);
  }
  PYDIST_DEVICE_MEMBER void run(int b, Run& v) const {
    Run r;
    x.run(b, v);
    residual.run(b, r);
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = v[j] + r[j];
  }
};

// Appends those of a run, whose values are v, that are not below `least`, a NaN among them.
template <bool kWhole, typename Source>
PYDIST_DEVICE void list_run(const Source& x, const Run& v, int i, int n, float least,
                            TopKShared* s) {
  bool any = false;
#pragma unroll
  for (int j = 0; j < kRun; ++j) any |= !(fabsf(v[j]) < least);
  if (!any) return;
  uint32_t mine = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    mine |= (kWhole || i + j < n) && !(fabsf(v[j]) < least) ? 1u << j : 0u;
  }
  uint32_t slot = atomicAdd(&s->candidates, static_cast<uint32_t>(__popc(mine)));
#pragma unroll 1
  for (; mine && slot < kMostCandidates; mine &= mine - 1, ++slot) {  // one, as a rule
    const int place = i + __ffs(static_cast<int>(mine)) - 1;
    s->values[slot] = x.one(place);
    s->places[slot] = static_cast<uint16_t>(place);
  }
}

// Lists all elements that are not below `least`; returns how many they are.
template <typename Source>
PYDIST_DEVICE int gather(const Source& x, int n, float least, TopKShared* s) {
  constexpr int kRuns = Batch<Source>::kRuns;
  if (thread_id() == 0) s->candidates = 0;
  __syncthreads();
#pragma unroll 1
  for (int base = 0; base < n; base += kRuns * kTile) {
    const int i = base + kRun * thread_id();
    Run v;
    if (Batch<Source>::fits(x, base + kRuns * kTile)) {
      Batch<Source> batch;
      batch.load(x, i);
#pragma unroll
      for (int b = 0; b < kRuns; ++b) {
        batch.run(b, v);
        list_run<true>(x, v, i + b * kTile, n, least, s);
      }
    } else {
#pragma unroll 1
      for (int at = i; at < n && at < i + kRuns * kTile; at += kTile) {
        x.run(at, v);
        list_run<false>(x, v, at, n, least, s);
      }
    }
  }
  __syncthreads();
  return static_cast<int>(s->candidates);
}

// ------------------------------------------------------------ the guess

constexpr int kSampleRuns = 16;  // of a warp
constexpr int kSampleRun = kRun * kWarpSize;
constexpr int kSample = kSampleRuns * kSampleRun;

// Runs of a warp at equal distances, the last at the end of the block.
template <typename Source>
struct Sample {
  const Source& x;
  int apart;  // a multiple of kRun

  PYDIST_DEVICE_MEMBER Sample(const Source& source, int n)
      : x(source),
        apart(n > kSample ? (n - kSampleRun) / (kSampleRuns - 1) / kRun * kRun : kSampleRun) {}

  PYDIST_DEVICE_MEMBER void run(int i, Run& v) const {
    x.run(i / kSampleRun * apart + i % kSampleRun, v);
  }
};

// Which of the sample's largest to guess: four standard deviations more than there should be of k,
// so that hardly ever too few elements are above it. 0: too many would be.
PYDIST_DEVICE int rank_to_guess(int k, int sample, int n) {
  const float share = static_cast<float>(k) * static_cast<float>(sample) / static_cast<float>(n);
  const float rank = share + 4.0f * __fsqrt_rn(share) + 8.0f;
  const float above = rank * static_cast<float>(n) / static_cast<float>(sample);
  return 1.5f * above > kMostCandidates || rank > static_cast<float>(sample)
             ? 0
             : static_cast<int>(rank);
}

// Lists candidates among which the k largest are, or what is not finite, and returns how many they
// are; 0 where all elements have to be counted.
template <typename Source>
PYDIST_DEVICE int find_candidates(const Source& x, int n, int k, TopKShared* s) {
  float least = 0.0f;
  if (n > kMostCandidates) {
    const int sample = n < kSample ? n : kSample;
    const int rank = rank_to_guess(k, sample, n);
    if (rank == 0) return 0;
    const Magnitude guess = find_magnitude(Sample<Source>(x, n), sample, rank, kDigitBits, s);
    const uint32_t bits = guess.finite ? guess.digits << kDigitBits : kInfBits;
    least = bits_float(bits ? bits : 1u);  // zeros are taken where nothing else is left
  }
  const int count = gather(x, n, least, s);
  return count >= k && count <= kMostCandidates ? count : 0;
}

// ------------------------------------------------------------ the threshold

struct Threshold {
  bool finite;
  uint32_t magnitude;
  TopKTies ties;

  PYDIST_DEVICE_MEMBER bool all_ties() const { return ties.wanted == ties.ties; }
};

// The k-th largest magnitude, and which of its equals are taken.
template <typename Source>
PYDIST_DEVICE Threshold find_threshold(const Source& x, int n, int k, int turn, TopKShared* s) {
  const Magnitude found = find_magnitude(x, n, k, 0, s);
  if (!found.finite) return {false, 0u, {0, 0, 0, 0}};
  Threshold t = {
      true, found.digits, {turn, static_cast<int>(found.wanted), 0, static_cast<int>(found.ties)}};
  if (t.all_ties()) return t;
  uint32_t below = 0, total;
#pragma unroll 1
  for (int i = kRun * thread_id(); i < n; i += kTile) {
    Run v;
    x.run(i, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const bool tied = i + j < n && (float_bits(v[j]) & kAbsMask) == t.magnitude;
      below += tied && place_of(x, i + j) < turn ? 1u : 0u;
    }
  }
  sum_before(below, s, &total);
  t.ties.below = static_cast<int>(total);
  return t;
}

}  // namespace pydist::cuda
