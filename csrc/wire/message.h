// The header of a message, as pydist/formats/wire.py packs it: 16 bytes, of which one word is a
// checksum.
#pragma once

#include "layout.h"

namespace pydist {

constexpr int64_t kHeaderBytes = 16;

// The checksum is the CRC32C of the whole message in which its own four bytes hold the digest of
// the call, so that it tells apart damage and messages of another call alike.
constexpr int64_t kChecksumAt = 8;
constexpr int64_t kChecksumBytes = 4;

}  // namespace pydist
