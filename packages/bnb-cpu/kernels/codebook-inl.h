// An 8-bit codebook: blocks of codes to values and back.
#pragma once

#include "grid8-inl.h"

#if defined(__AVX512BW__)
#include "codebook_avx512-inl.h"
#elif defined(__AVX2__)
#include "codebook_avx2-inl.h"
#else

namespace bnb_cpu {
namespace BNB_ISA {

class Codebook {
 public:
  // Values in a block, at most.
  static constexpr int kBlock = 256;
  static constexpr bool kDecodesVectors = true;

  void prepare(const float* qmap) {
    memcpy(values_, qmap, sizeof values_);
    prepare_codes(qmap, 256);
  }

  // For `quantize` alone; `code_size` is at most 256.
  void prepare_codes(const float* code, int64_t code_size) {
    fill_grid_codes(code, code_size, grid_codes_);
    grid_codes_[kNanPosition] = 0;
  }

  // Any number of values, and NaN among them gets code 0. `finite`: that all are finite.
  template <class T>
  void quantize(const T* x, float scale, bool, int64_t count, uint8_t* codes) const {
    encode_block_8bit(x, count, scale, grid_codes_, codes);
  }

  // `values` has room for a whole block.
  void decode(const uint8_t* codes, float absmax, int count, float* values) const {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(values + i, decode_some(codes + i, splat(absmax)));
    }
    for (; i < count; ++i) {
      values[i] = decode_some(codes + i, absmax);
    }
  }

  // The values of as many codes as `absmax` has lanes.
  F32 decode_some(const uint8_t* codes, F32 absmax) const { return lookup(Table256(values_), codes) * absmax; }
  float decode_some(const uint8_t* codes, float absmax) const { return values_[*codes] * absmax; }

  // absmax: that of the values, which are all finite. Values after the last one may be overwritten.
  void encode(float* values, float absmax, int count, uint8_t* codes) const {
    if (absmax == 0.0f) {
      memset(codes, 0, static_cast<size_t>(count));
    } else {
      encode_block_8bit(values, count, 1.0f / absmax, grid_codes_, codes);
    }
  }

 private:
  alignas(64) float values_[256];
  uint8_t grid_codes_[bnb::kGridPoints + 1];
};

}  // namespace BNB_ISA
}  // namespace bnb_cpu

#endif
