// lion_pack: direction, its sign bit, and the new momentum in one pass over gradient and momentum.
//
// Reads gradient and momentum once, writes momentum and one bit per element. An element whose
// gradient or new momentum is not finite keeps its old momentum and raises the flag.
#include "../rows.cuh"

namespace pydist::cuda {
namespace {

// What a direction becomes: its sign, with zero as a 0 or a 1 bit, or a random vote.
enum class Vote { kZeroIsMinus, kZeroIsPlus, kStochastic };

// One Philox group is eight draws, so stochastic votes go eight elements a lane, scalar access too.
constexpr int kDrawsPerGroup = 8;

struct Pieces {  // pointers at the chunk's first element
  const void* grad;
  const void* momentum;
  void* momentum_out;
};

template <Vote kVote>
PYDIST_DEVICE bool votes_plus(float c, const LionPackArgs& a, uint32_t draw) {
  if (kVote == Vote::kStochastic) return vote_threshold(c, a.inv_range) > static_cast<float>(draw);
  return kVote == Vote::kZeroIsPlus ? c >= 0.0f : c > 0.0f;
}

// The bits of a lane's run of elements; m becomes the new momentum.
template <Vote kVote, typename G, typename M, int kWidth>
PYDIST_DEVICE uint32_t lion_run(const G (&g)[kWidth], M (&m)[kWidth], const LionPackArgs& a,
                                const Philox4& draws, bool* finite) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float grad = widen(g[j]);
    const float old = widen(m[j]);
    const float c = lion_mix(a.beta1, old, a.one_minus_beta1, grad);
    const uint32_t draw = kVote == Vote::kStochastic ? draw16(draws, j) : 0u;
    bits |= (votes_plus<kVote>(c, a, draw) ? 1u : 0u) << j;
    const float next = lion_mix(a.beta2, old, a.one_minus_beta2, grad);
    const bool keep = (float_bits(grad) & kAbsMask) < kInfBits &&
                      (float_bits(next) & kAbsMask) < FiniteLimit<M>::value;
    narrow(keep ? next : old, &m[j]);
    *finite = *finite && keep;
  }
  return bits;
}

template <Vote kVote, typename G, typename M, int kWidth, bool kVector>
PYDIST_DEVICE uint32_t lion_chunk(const Pieces& at, int n, int lane, int64_t first,
                                  const LionPackArgs& a, const DrawKey& key, bool* finite) {
  constexpr int kSteps = kWordBits / kWidth;
  constexpr int kBatch = kWidth == 8 ? (kVote == Vote::kStochastic ? 1 : 2) : 4;
  const G* grad = static_cast<const G*>(at.grad);
  const M* momentum = static_cast<const M*>(at.momentum);
  M* momentum_out = static_cast<M*>(at.momentum_out);
  uint32_t bits = 0;
#pragma unroll 1
  for (int k0 = 0; k0 < kSteps; k0 += kBatch) {
    if (!kVector && k0 * kWidth * kWarpSize >= n) break;
    G g[kBatch][kWidth];
    M m[kBatch][kWidth];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = kWidth * ((k0 + k) * kWarpSize + lane);
      load_run<G, kWidth, kVector>(grad, i, n, g[k]);
      load_run<M, kWidth, kVector>(momentum, i, n, m[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = kWidth * ((k0 + k) * kWarpSize + lane);
      Philox4 draws = {};
      if (kVote == Vote::kStochastic) {
        draws = draw_bits(key, static_cast<uint64_t>(first + i) * 16);
      }
      const uint32_t run = lion_run<kVote>(g[k], m[k], a, draws, finite);
      bits |= run << (kWidth * (k0 + k));
      store_run<M, kWidth, kVector>(momentum_out, i, n, m[k]);
    }
  }
  return transpose_bits<kWidth>(bits, lane);
}

template <Vote kVote, typename G, typename M>
__global__ void __launch_bounds__(kBlockThreads, 2)
    lion_pack_kernel(Rows rows, unsigned char* payload, LionPackArgs a, uint32_t* flags) {
  // Otherwise 16 bytes of the wider type, so that both streams are read in whole lines.
  constexpr int kWidest = static_cast<int>(sizeof(G) > sizeof(M) ? sizeof(G) : sizeof(M));
  constexpr int kVectorWidth = kVote == Vote::kStochastic ? kDrawsPerGroup : 16 / kWidest;
  constexpr int kScalarWidth = kVote == Vote::kStochastic ? kDrawsPerGroup : 1;
  const int lane = lane_id();
  const uint32_t step = kVote == Vote::kStochastic ? static_cast<uint32_t>(step_of(a)) : 0u;
  bool finite = true;
  for_chunks<kElementTile>(rows, [&](const Row& row, int64_t start) {
    const int n = chunk_elements<kElementTile>(row, start);
    const int64_t begin = start * kWordBits;
    const Pieces at = {device_pointer<G>(row.x) + begin, device_pointer<M>(row.momentum) + begin,
                       device_pointer<M>(row.momentum_out) + begin};
    const DrawKey key = {a.seed, a.key1, step, static_cast<uint32_t>(row.ordinal)};
    const int64_t first = row.first + begin;
    int word;
    uint32_t bits;
    if (n == kElementChunk && aligned<kVectorBytes<G, kVectorWidth>>(row.x) &&
        aligned<kVectorBytes<M, kVectorWidth>>(row.momentum | row.momentum_out)) {
      bits = lion_chunk<kVote, G, M, kVectorWidth, true>(at, n, lane, first, a, key, &finite);
      word = word_of_lane<kVectorWidth>(lane);
    } else {
      bits = lion_chunk<kVote, G, M, kScalarWidth, false>(at, n, lane, first, a, key, &finite);
      word = word_of_lane<kScalarWidth>(lane);
    }
    const int rest = n - word * kWordBits;
    if (rest > 0)
      store_word(payload + row.message + 4 * (row.word + start + word), bits & word_mask(rest));
  });
  raise_flags(flags, !finite);
}

template <typename G, typename M>
void launch_typed(const Rows& rows, unsigned char* payload, const LionPackArgs& args,
                  uint32_t* flags, void* stream) {
  auto kernel = args.zero_bit ? lion_pack_kernel<Vote::kZeroIsPlus, G, M>
                              : lion_pack_kernel<Vote::kZeroIsMinus, G, M>;
  if (args.inv_range != 0.0f) kernel = lion_pack_kernel<Vote::kStochastic, G, M>;
  launch_over<kElementTile>("lion_pack", kernel, rows, stream, payload, args, flags);
}

template <typename G>
void launch_gradient(const Rows& rows, DType momentum, unsigned char* payload,
                     const LionPackArgs& args, uint32_t* flags, void* stream) {
  if (momentum == DType::kFloat32) {
    return launch_typed<G, float>(rows, payload, args, flags, stream);
  }
  launch_typed<G, BFloat>(rows, payload, args, flags, stream);
}

}  // namespace

void lion_pack(const Rows& rows, DType grad, DType momentum, unsigned char* payload,
               const LionPackArgs& args, uint32_t* flags, void* stream) {
  switch (grad) {
    case DType::kFloat32:
      return launch_gradient<float>(rows, momentum, payload, args, flags, stream);
    case DType::kFloat16:
      return launch_gradient<Half>(rows, momentum, payload, args, flags, stream);
    case DType::kBFloat16:
      return launch_gradient<BFloat>(rows, momentum, payload, args, flags, stream);
  }
}

}  // namespace pydist::cuda
