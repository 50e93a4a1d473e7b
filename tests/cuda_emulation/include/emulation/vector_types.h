// dim3 and the vector types: CUDA's names, sizes and alignments.
#pragma once

#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATION_VECTOR(scalar, name, align1, align2, align3, align4)                 \
  struct alignas(align1) name##1 { scalar x; };                                        \
  struct alignas(align2) name##2 { scalar x, y; };                                     \
  struct alignas(align3) name##3 { scalar x, y, z; };                                  \
  struct alignas(align4) name##4 { scalar x, y, z, w; };                               \
  constexpr name##1 make_##name##1(scalar x) { return {x}; }                           \
  constexpr name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }              \
  constexpr name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

EMULATION_VECTOR(signed char, char, 1, 2, 1, 4)
EMULATION_VECTOR(unsigned char, uchar, 1, 2, 1, 4)
EMULATION_VECTOR(short, short, 2, 4, 2, 8)
EMULATION_VECTOR(unsigned short, ushort, 2, 4, 2, 8)
EMULATION_VECTOR(int, int, 4, 8, 4, 16)
EMULATION_VECTOR(unsigned, uint, 4, 8, 4, 16)
EMULATION_VECTOR(float, float, 4, 8, 4, 16)
EMULATION_VECTOR(double, double, 8, 16, 8, 16)
EMULATION_VECTOR(long long, longlong, 8, 16, 8, 16)
EMULATION_VECTOR(unsigned long long, ulonglong, 8, 16, 8, 16)
#undef EMULATION_VECTOR
