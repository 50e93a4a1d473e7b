// What the ternary kernels share: tiles of whole units, and the scalers behind a row's addresses.
#pragma once

#include <cstring>

#include "../../wire/ternary.h"

namespace pydist::cpu::PYDIST_ISA {

constexpr int kUnitsTile = 8 * kUnit;  // elements

PYDIST_INLINE float scaler_at(int64_t address) {
  float scaler;
  std::memcpy(&scaler, reinterpret_cast<const void*>(address), sizeof(scaler));
  return scaler;
}

}  // namespace pydist::cpu::PYDIST_ISA
