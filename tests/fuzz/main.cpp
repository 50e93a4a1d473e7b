// Runs the targets on changed inputs: with a mutator of its own, or as libFuzzer asks.
//
//   fuzz [--runs N] [--seconds S] [--seed S] [--first K] [target ...]
//
// A run depends on (seed, number) alone: after a crash, `--first K --runs 1` repeats it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../../csrc/cpu/driver.h"
#include "targets.h"

namespace fuzz {
namespace {

// Every instruction set in turn.
void choose_isa(uint64_t number) {
  static const std::vector<std::string> isas = pydist::cpu::supported_isas();
  pydist::cpu::select_isa(isas[number % isas.size()]);
}

}  // namespace
}  // namespace fuzz

#if defined(PYDIST_LIBFUZZER)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  fuzz::choose_isa(data[0]);
  fuzz::Input input(data + 2, size - 2);
  fuzz::kTargets[data[1] % fuzz::kTargetCount].run(input);
  return 0;
}

#else

namespace fuzz {
namespace {

uint64_t current_run = 0, current_seed = 0;
const char* current_target = "";

// One to four changes of an input.
void mutate(Bytes& bytes, Random& random) {
  for (uint64_t left = 1 + random() % 4; left && !bytes.empty(); --left) {
    const size_t at = random() % bytes.size();
    const size_t count = std::min<size_t>(1 + random() % 8, bytes.size() - at);
    switch (random() % 8) {
      case 0:
      case 1:
        bytes[at] ^= static_cast<uint8_t>(1u << random() % 8);
        break;
      case 2:
        bytes[at] = static_cast<uint8_t>(random());
        break;
      case 3:
        std::fill_n(bytes.begin() + static_cast<ptrdiff_t>(at), count, random() % 2 ? 0xFF : 0);
        break;
      case 4:
        bytes[at] = static_cast<uint8_t>(bytes[at] + random() % 9 - 4);
        break;
      case 5:
        bytes.erase(bytes.begin() + static_cast<ptrdiff_t>(at),
                    bytes.begin() + static_cast<ptrdiff_t>(at + count));
        break;
      case 6:
        bytes.insert(bytes.begin() + static_cast<ptrdiff_t>(at), count,
                     static_cast<uint8_t>(random()));
        break;
      default:
        std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(random() % (bytes.size() - count + 1)),
                    count, bytes.begin() + static_cast<ptrdiff_t>(at));
    }
  }
}

struct Tally {
  uint64_t runs = 0, rejected = 0;
};

void run_one(const Target& target, uint64_t seed, uint64_t number, Tally& tally) {
  Random random(seed * 0x9E3779B97F4A7C15u + number);
  current_run = number, current_target = target.name;
  choose_isa(random());
  Bytes bytes = target.make(random);
  if (random() % 32) mutate(bytes, random);  // some stay as they are
  Input input(bytes.data(), bytes.size());
  ++tally.runs;
  tally.rejected += target.run(input) ? 0 : 1;
}

extern "C" void __sanitizer_set_death_callback(void (*callback)());

void say_where() {
  std::fprintf(stderr, "fuzz: target %s, repeat with --seed %llu --first %llu --runs 1 %s\n",
               current_target, static_cast<unsigned long long>(current_seed),
               static_cast<unsigned long long>(current_run), current_target);
}

int run_all(int argc, char** argv) {
  uint64_t runs = 0, seed = 1, first = 0;
  double seconds = 0;
  std::vector<const Target*> chosen;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const bool option = name.rfind("--", 0) == 0;
    if (option && i + 1 == argc) return std::fprintf(stderr, "fuzz: %s what?\n", argv[i]), 2;
    if (name == "--runs") {
      runs = std::strtoull(argv[++i], nullptr, 10);
    } else if (name == "--seconds") {
      seconds = std::strtod(argv[++i], nullptr);
    } else if (name == "--seed") {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (name == "--first") {
      first = std::strtoull(argv[++i], nullptr, 10);
    } else {
      const Target* const end = kTargets + kTargetCount;
      const Target* found =
          std::find_if(kTargets, end, [&](const Target& t) { return name == t.name; });
      if (found == end) return std::fprintf(stderr, "fuzz: no target %s\n", argv[i]), 2;
      chosen.push_back(found);
    }
  }
  if (chosen.empty()) {
    for (size_t i = 0; i < kTargetCount; ++i) chosen.push_back(&kTargets[i]);
  }
  if (!runs && seconds <= 0) runs = 100000;
  current_seed = seed;
  __sanitizer_set_death_callback(say_where);
  for (const Target* target : chosen) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const auto elapsed = [&] {
      return std::chrono::duration<double>(Clock::now() - start).count();
    };
    Tally tally;
    for (uint64_t number = first; !runs || number < first + runs; ++number) {
      if (seconds > 0 && number % 256 == 0 && elapsed() >= seconds) break;
      run_one(*target, seed, number, tally);
    }
    std::printf("%-8s %llu payloads, %llu malformed, %.1f s, no error\n", target->name,
                static_cast<unsigned long long>(tally.runs),
                static_cast<unsigned long long>(tally.rejected), elapsed());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) { return fuzz::run_all(argc, argv); }

#endif
