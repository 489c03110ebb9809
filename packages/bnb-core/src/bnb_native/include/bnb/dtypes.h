// Element types that kernels take, and their conversion to and from float32.
#pragma once

#include <bnb/portable.h>

namespace bnb {

// Shared with Python, which passes the number.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Storage of 16-bit values. Distinct types, so that overloads can tell them apart.
struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

BNB_FN float to_float(float value) { return value; }

BNB_FN float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

BNB_FN float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0x1f) {
    // Infinity, or NaN made quiet as the conversion instructions do.
    return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x00400000u : 0u));
  }
  if (exponent == 0) {
    // Zero or subnormal: the mantissa counts units of 2^-24, which float32 holds exactly.
    return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  }
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even; overflow gives infinity, NaN stays NaN (quiet).
BNB_FN BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

BNB_FN Half to_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu))};
  }
  if (size >= 0x477ff000u) {  // 65520, halfway between the largest finite value and the next step
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (size < 0x38800000u) {
    // Below 2^-14 the result is subnormal. Adding 0.5 lines its last bit, 2^-24, up with that of the
    // sum, so that the addition itself rounds to nearest even.
    return {static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)))};
  }
  const uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

BNB_FN void from_float(float value, float& out) { out = value; }
BNB_FN void from_float(float value, Half& out) { out = to_half(value); }
BNB_FN void from_float(float value, BFloat16& out) { out = to_bfloat16(value); }

}  // namespace bnb
