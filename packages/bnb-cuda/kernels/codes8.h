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
// A first table, by sign, exponent and the five upper mantissa bits of the value, says how many
// boundaries lie below all values with these bits. From there the boundaries are walked: one step on
// average for the dynamic map, whatever their number for others.
class Encoder8 {
 public:
  // Values below 2^-kOctaves share a key, as do those from 1.
  static constexpr int kOctaves = 24;
  static constexpr int kSteps = 32;
  static constexpr int kKeys = kOctaves * kSteps + 1;

  struct Storage {
    float boundaries[256];
    uint8_t first[2 * kKeys + 2];
  };

  // Of no use until it is assigned to.
  __device__ Encoder8() : storage_(nullptr) {}

  // All threads of the block call this; the caller synchronises afterwards.
  __device__ Encoder8(Storage& storage, const float* code, int code_size) : storage_(&storage) {
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
    for (int i = threadIdx.x; i < 2 * kKeys; i += blockDim.x) {
      const int key = i % kKeys;
      const bool negative = i >= kKeys;
      // The smallest value with this key: its lower border, or minus its upper border.
      float border = key == 0 ? 0.0f : border_of(key);
      if (negative) {
        border = key == kKeys - 1 ? -bnb::float_of(0x7f800000u) : -border_of(key + 1);
      }
      int rank = 0;
      for (int step = 128; step > 0; step >>= 1) {
        rank += storage.boundaries[rank + step - 1] < border ? step : 0;
      }
      storage.first[i] = static_cast<uint8_t>(rank);
    }
  }

  __device__ __forceinline__ uint8_t operator()(float scaled) const {
    const unsigned bits = bnb::bits_of(scaled);
    int key = static_cast<int>((bits & 0x7fffffffu) >> 18) - (127 - kOctaves) * kSteps;
    key = min(max(key, 0), kKeys - 1);
    int rank = storage_->first[key + (bits >> 31 ? kKeys : 0)];
    while (scaled > storage_->boundaries[rank]) {
      ++rank;
    }
    return scaled == scaled ? static_cast<uint8_t>(rank) : uint8_t{0};
  }

 private:
  __device__ static float border_of(int key) {
    return bnb::float_of(static_cast<unsigned>(key + (127 - kOctaves) * kSteps) << 18);
  }
  __device__ static float float_below(float value) {
    const unsigned bits = bnb::bits_of(value);
    if (value > 0.0f) {
      return bnb::float_of(bits - 1);
    }
    return bnb::float_of(value == 0.0f ? 0x80000001u : bits + 1);
  }

  const Storage* storage_;
};

}  // namespace bnb_gpu
