// The codebook of an 8-bit optimizer state: blocks of codes to values and back.
#pragma once

#include "quant8-inl.h"

#if defined(__AVX512BW__)
#include "codebook_avx512-inl.h"
#endif

namespace bnb_cpu {
namespace BNB_ISA {

#if !defined(__AVX512BW__)

class Codebook {
 public:
  void prepare(const float* qmap) {
    memcpy(values_, qmap, sizeof values_);
    fill_grid_codes(qmap, 256, grid_codes_);
    grid_codes_[kNanPosition] = 0;
  }

  void decode(const uint8_t* codes, float absmax, int count, float* values) const {
    const Table256 table(values_);
    const F32 scale = splat(absmax);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(values + i, lookup(table, load_bytes(codes + i)) * scale);
    }
    for (; i < count; ++i) {
      values[i] = values_[codes[i]] * absmax;
    }
  }

  // Values that encode_step takes.
  static constexpr int kStep = 32;

  // Whether encode_step serves values whose absmax has this reciprocal.
  bool is_usual(float) const { return true; }

  // Scales and encodes kStep values.
  BNB_FN void encode_step(const Codebook& book, const float* values, float scale, uint8_t* codes) {
    encode_block_8bit(values, kStep, scale, book.grid_codes_, codes);
  }

  // Scales and encodes any values.
  void encode_each(const float* values, float scale, int count, uint8_t* codes) const {
    encode_block_8bit(values, count, scale, grid_codes_, codes);
  }

 private:
  alignas(64) float values_[256];
  uint8_t grid_codes_[bnb::kGridPoints + 1];
};

#endif

}  // namespace BNB_ISA
}  // namespace bnb_cpu
