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
  // Whether codes are decoded a vector at a time as well, by decode_some.
  static constexpr bool kDecodesVectors = false;

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
    const Table256 table(values_);
    const F32 scale = splat(absmax);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(values + i, lookup(table, codes + i) * scale);
    }
    for (; i < count; ++i) {
      values[i] = values_[codes[i]] * absmax;
    }
  }

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
