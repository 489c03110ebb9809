// 8-bit codes on the device: the search in a sorted codebook, and the table for the way back.
#pragma once

#include <bnb/quant.h>

#include "block.h"
#include "codes4.h"

namespace bnb_gpu {

// All threads of the block call this; the caller synchronises afterwards. Codes beyond the end of the
// codebook read its last value.
__device__ __forceinline__ void load_table(float* shared, const float* code, int code_size) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    shared[i] = code[i < code_size ? i : code_size - 1];
  }
}

// Finds the nearest codebook value; a tie goes to the even code, NaN to code 0.
//
// Sign, exponent and the upper mantissa bits of a value name a cell. Its entry has the code at the cell's
// end near zero and, where a boundary between codes crosses the cell, the mantissa bits from which on the
// code is the next one: one look-up and one comparison of integers. The cells are narrow enough for the
// dynamic maps; a codebook with several boundaries in a cell is searched by bisection.
class Encoder8 {
 public:
  // Values below 2^-kOctaves share a cell, as do those from 1. A codebook without negative values has
  // twice the cells per octave.
  static constexpr int kOctaves = 22;
  static constexpr int kSignedBits = 6;
  static constexpr int kCells = 2 * ((kOctaves << kSignedBits) + 1);

  struct Storage {
    float boundaries[256];
    unsigned entries[kCells];
    int crowded;
  };

  // Of no use until it is assigned to.
  __device__ Encoder8() : storage_(nullptr), shift_(0), signed_(false) {}

  // All threads of the block call this; the caller synchronises afterwards.
  __device__ Encoder8(Storage& storage, const float* code, int code_size)
      : storage_(&storage), shift_(23 - kSignedBits), signed_(code[0] < 0.0f) {
    shift_ -= signed_ ? 0 : 1;
    if (threadIdx.x == 0) {
      storage.crowded = 0;
    }
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
      float boundary = bnb::float_of(0x7f800000u);
      if (i + 1 < code_size) {
        boundary = bnb::midpoint_8bit(code[i], code[i + 1]);
        // Of two equal values the lower code serves.
        if (i % 2 == 1 && code[i] != code[i + 1]) {
          boundary = float_below(boundary);
        }
      }
      storage.boundaries[i] = boundary;
    }
    __syncthreads();
    // A thread fills neighbouring cells: one search, then a walk along the boundaries.
    const int side = cells_per_side(), total = signed_ ? 2 * side : side;
    const int share = (total + blockDim.x - 1) / blockDim.x;
    const int first = threadIdx.x * share, stop = min(first + share, total);
    bool crowded = false;
    int rank = 0;
    for (int i = first; i < stop; ++i) {
      const bool negative = i >= side;
      const int cell = negative ? i - side : i;
      if (i == first || cell == 0) {
        rank = boundaries_below(negative ? above_minus(low_end(cell)) : low_end(cell));
      }
      // Positive: boundaries below the cell. Negative: boundaries up to minus the low end.
      const int base = rank;
      const float high = cell + 1 == side ? bnb::float_of(0x7f800000u) : low_end(cell + 1);
      float boundary = 0.0f;
      if (negative) {
        while (rank > 0 && storage.boundaries[rank - 1] > -high) {
          --rank;
        }
        boundary = base > 0 ? storage.boundaries[base - 1] : 0.0f;
      } else {
        while (rank < 255 && storage.boundaries[rank] < high) {
          ++rank;
        }
        boundary = storage.boundaries[base];
      }
      const int crossing = negative ? base - rank : rank - base;
      crowded |= crossing > 1 || (crossing == 1 && (cell == 0 || cell + 1 == side));
      const unsigned low = bnb::bits_of(boundary) & low_mask();
      const unsigned from = crossing == 0 ? low_mask() + 1 : negative ? low : low + 1;
      storage.entries[i] = static_cast<unsigned>(base) << 24 | from;
    }
    if (crowded) {
      storage.crowded = 1;
    }
  }

  // Codes of several values: their look-ups overlap.
  template <int kCount>
  __device__ __forceinline__ Vector<uint8_t, kCount> operator()(const float (&scaled)[kCount]) const {
    // Put together in registers: bytes of an array would go through local memory.
    unsigned words[(kCount + 3) / 4] = {};
    if (storage_->crowded) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        words[i / 4] |= (scaled[i] == scaled[i] ? boundaries_below(scaled[i]) : 0) << (8 * (i % 4));
      }
    } else {
      search(scaled, words);
    }
    Vector<uint8_t, kCount> codes;
    memcpy(&codes, words, sizeof codes);
    return codes;
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void search(const float (&scaled)[kCount], unsigned* words) const {
    const int side = cells_per_side();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const unsigned bits = bnb::bits_of(scaled[i]);
      const bool negative = bits >> 31 != 0;
      const int magnitude = static_cast<int>(bits & 0x7fffffffu);
      int cell = min(max((magnitude >> shift_) - first_cell(), 0), side - 1);
      cell = negative ? (signed_ ? cell + side : 0) : cell;
      const unsigned entry = storage_->entries[cell];
      const int base = static_cast<int>(entry >> 24);
      const bool crossed = (bits & low_mask()) >= (entry & 0xffffffu) && (signed_ || !negative);
      const int rank = crossed ? (negative ? base - 1 : base + 1) : base;
      words[i / 4] |= static_cast<unsigned>(scaled[i] == scaled[i] ? rank : 0) << (8 * (i % 4));
    }
  }

  __device__ __forceinline__ int cells_per_side() const { return (kOctaves << (23 - shift_)) + 1; }
  __device__ __forceinline__ int first_cell() const { return (127 - kOctaves) << (23 - shift_); }
  __device__ __forceinline__ unsigned low_mask() const { return (1u << shift_) - 1; }
  __device__ float low_end(int cell) const {
    return cell == 0 ? 0.0f : bnb::float_of(static_cast<unsigned>(cell + first_cell()) << shift_);
  }
  // The smallest number above -x.
  __device__ static float above_minus(float x) {
    return x == 0.0f ? bnb::float_of(1u) : -bnb::float_of(bnb::bits_of(x) - 1);
  }
  __device__ static float float_below(float value) {
    const unsigned bits = bnb::bits_of(value);
    if (value > 0.0f) {
      return bnb::float_of(bits - 1);
    }
    return bnb::float_of(value == 0.0f ? 0x80000001u : bits + 1);
  }
  __device__ int boundaries_below(float value) const {
    int rank = 0;
    for (int step = 128; step > 0; step >>= 1) {
      rank += storage_->boundaries[rank + step - 1] < value ? step : 0;
    }
    return rank;
  }

  const Storage* storage_;
  int shift_;
  bool signed_;
};

}  // namespace bnb_gpu
