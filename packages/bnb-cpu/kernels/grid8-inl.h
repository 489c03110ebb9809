// The grid of 8-bit block-wise quantization: boundaries of a codebook on it, and codes by look-up in a table.
#pragma once

#include "simd-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// The first grid position whose point is above a boundary, at least `position`: that of a boundary that is not
// higher.
BNB_FN int first_position_above(float boundary, int position) {
  // The points are sorted: start near the boundary and walk to the first point above it.
  int next = boundary >= 1.0f ? bnb::kGridPoints : boundary > -1.0f ? bnb::grid_position(boundary) : 0;
  next = next < position ? position : next;
  while (next > position && !(bnb::grid_value(next - 1) <= boundary)) {
    --next;
  }
  while (next < bnb::kGridPoints && bnb::grid_value(next) <= boundary) {
    ++next;
  }
  return next;
}

// For each point of the grid, the code nearest to it: as many codes as have a boundary below the point.
BNB_FN void fill_grid_codes(const float* code, int64_t code_size, uint8_t* grid_codes) {
  int position = 0;
  for (int64_t i = 0; i + 1 < code_size; ++i) {
    const int next = first_position_above(bnb::midpoint_8bit(code[i], code[i + 1]), position);
    memset(grid_codes + position, static_cast<int>(i), static_cast<size_t>(next - position));
    position = next;
  }
  memset(grid_codes + position, static_cast<int>(code_size - 1), static_cast<size_t>(bnb::kGridPoints - position));
}

// The position after the grid stands for NaN, which gets code 0.
constexpr int kNanPosition = bnb::kGridPoints;

BNB_FN I32 position_or_nan(F32 scaled) {
  const F32 clamped = min(max(scaled, splat(-1.0f)), splat(1.0f));
  const I32 position = truncate((clamped + splat(1.0f)) * splat(bnb::kGridScale) + splat(0.5f));
  return select(scaled <= splat(bnb::float_of(0x7f800000u)), position, splat(kNanPosition));
}

BNB_FN int position_or_nan(float scaled) { return bnb::is_nan(scaled) ? kNanPosition : bnb::grid_position(scaled); }

template <class T>
void encode_block_8bit(const T* x, int64_t count, float scale, const uint8_t* grid_codes, uint8_t* codes) {
  // Positions are computed in vectors and looked up one by one: the table is too large for registers, and
  // gathers of single bytes are slower than loads.
  constexpr int kChunk = 256;
  int32_t positions[kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int size = static_cast<int>(count - start < kChunk ? count - start : kChunk);
    const int whole = size / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      store(positions + i, position_or_nan(load(x + start + i) * splat(scale)));
    }
    for (int i = whole; i < size; ++i) {
      positions[i] = position_or_nan(bnb::to_float(x[start + i]) * scale);
    }
    for (int j = 0; j < size; ++j) {
      codes[start + j] = grid_codes[positions[j]];
    }
  }
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
