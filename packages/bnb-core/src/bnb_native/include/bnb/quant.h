// Encoding and decoding of one element. Kernels move data; the arithmetic of the formats is here.
//
// Every step is one IEEE float32 operation with its own rounding: compile without contraction to
// fused multiply-add (-ffp-contract=off, --fmad=false), or codes near a boundary change.
#pragma once

#include <bnb/codebooks.h>
#include <bnb/dtypes.h>
#include <bnb/portable.h>

namespace bnb {

// --- absmax ------------------------------------------------------------------------------------
//
// Largest magnitude of a block, accumulated on the bit patterns: those of non-negative floats order
// as the floats do, and NaN lies above infinity, so one integer maximum does not depend on the order
// of the values and keeps NaN.

BNB_FN uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }

// The same with NaN counted as zero.
BNB_FN uint32_t magnitude_bits_or_zero(float value) {
  const uint32_t bits = magnitude_bits(value);
  return bits > 0x7f800000u ? 0u : bits;
}

// --- 4 bit -------------------------------------------------------------------------------------

// Shared with Python, which passes the number.
enum class QuantType : int { kNf4 = 0, kFp4 = 1 };

// Lower bound of absmax before its reciprocal is taken, near the smallest normal float32.
constexpr float kTinyAbsmax = 1e-38f;

BNB_FN float clamp_absmax_4bit(float absmax) { return absmax < kTinyAbsmax ? kTinyAbsmax : absmax; }

// Number of midpoints below a scaled value: a value on a midpoint takes the lower rank, NaN the
// highest. `midpoints` are 15 ascending numbers.
BNB_FN unsigned rank_4bit(float scaled, const float* midpoints) {
  unsigned rank = 0;
  for (unsigned step = 8; step != 0; step >>= 1) {
    rank += scaled <= midpoints[rank + step - 1] ? 0u : step;
  }
  return rank;
}

// The earlier value of a pair lies in the high nibble.
BNB_FN uint8_t pack_nibbles(unsigned earlier, unsigned later) { return static_cast<uint8_t>(earlier << 4 | later); }

// Code of element `index` in packed codes.
BNB_FN unsigned nibble_at(const uint8_t* packed, int64_t index) {
  const unsigned byte = packed[index >> 1];
  return index & 1 ? byte & 0xfu : byte >> 4;
}

// --- 8 bit, block-wise -------------------------------------------------------------------------

// A scaled value is rounded to one of this many evenly spaced points of [-1, 1] before the search.
constexpr int kGridPoints = 65536;
constexpr float kGridScale = 32767.5f;

// Grid point nearest to a scaled value; `scaled` is not NaN.
BNB_FN int grid_position(float scaled) {
  const float low = scaled < -1.0f ? -1.0f : scaled;
  const float clamped = low > 1.0f ? 1.0f : low;
  const float position = (clamped + 1.0f) * kGridScale;
  return static_cast<int>(position + 0.5f);
}

BNB_FN float grid_value(int position) { return static_cast<float>(position) / kGridScale - 1.0f; }

// Boundary between the codes of two neighbours in the codebook; a value on it takes the lower code.
BNB_FN float midpoint_8bit(float lower, float upper) { return (lower + upper) * 0.5f; }

// --- nested statistics -------------------------------------------------------------------------

// The absmax of a 4-bit block from its 8-bit code.
BNB_FN float nested_absmax(float code_value, float outer_absmax, float offset) {
  const float scaled = code_value * outer_absmax;
  return scaled + offset;
}

}  // namespace bnb
