// float16 and bfloat16 by bit arithmetic: the portable twin of the conversions in hardware.
// Everything is `static` on purpose: this header is compiled under several instruction sets, and
// a function with external linkage could be taken from the wrong one.
#pragma once

#include <cstdint>
#include <cstring>

namespace bn {

struct float16 { std::uint16_t bits; };
struct bfloat16 { std::uint16_t bits; };

static inline float bits_to_float(std::uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline std::uint32_t float_to_bits(float f) {
  std::uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

static inline float widen(float v) { return v; }
static inline double widen(double v) { return v; }
static inline float widen(bfloat16 v) { return bits_to_float(std::uint32_t(v.bits) << 16); }

static inline float widen(float16 v) {
  const std::uint32_t sign = std::uint32_t(v.bits & 0x8000u) << 16;
  const std::uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
  // subnormal: rest * 2^-24, exact in float32
  const float tiny = float(rest) * 5.9604644775390625e-08f;
  return bits_to_float(sign | float_to_bits(tiny));
}

// Round to nearest, ties to even; NaN stays NaN.
static inline bfloat16 to_bfloat16(float f) {
  const std::uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {std::uint16_t((u >> 16) | 0x40u)};
  return {std::uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

static inline float16 to_float16(float f) {
  const std::uint32_t u = float_to_bits(f);
  const std::uint16_t sign = std::uint16_t((u >> 16) & 0x8000u);
  const std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {std::uint16_t(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {std::uint16_t(sign | 0x7c00u)};  // 65520 and above round to inf
  if (a < 0x38800000u) {
    // subnormal: adding 0.5 leaves the value, rounded to a multiple of 2^-24, in the low bits
    const float shifted = bits_to_float(a) + 0.5f;
    return {std::uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const std::uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u;
  return {std::uint16_t(sign | (rounded >> 13))};
}

static inline void narrow(float v, float* p) { *p = v; }
static inline void narrow(double v, float* p) { *p = float(v); }
static inline void narrow(double v, double* p) { *p = v; }
static inline void narrow(float v, bfloat16* p) { *p = to_bfloat16(v); }
static inline void narrow(double v, bfloat16* p) { *p = to_bfloat16(float(v)); }
static inline void narrow(float v, float16* p) { *p = to_float16(v); }
static inline void narrow(double v, float16* p) { *p = to_float16(float(v)); }

}  // namespace bn
