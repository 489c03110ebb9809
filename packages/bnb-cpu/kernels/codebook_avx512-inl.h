// An 8-bit codebook, looked up and searched by permutes of registers instead of loads.
// For AVX-512 BW; VBMI, where the build has it, looks up bytes.
#pragma once

#include "grid8-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

class Codebook {
 public:
  // Values in a block, at most.
  static constexpr int kBlock = 256;
  static constexpr bool kDecodesVectors = false;

  void prepare(const float* qmap) {
    for (int i = 0; i < kCodes; ++i) {
      const uint32_t bits = bnb::bits_of(qmap[i]);
      for (int plane = 0; plane < kPlanes; ++plane) {
        planes_[plane][i] = static_cast<Part>(bits >> (32 / kPlanes * plane));
      }
    }
    prepare_codes(qmap, kCodes);
  }

  // For `quantize` alone; `code_size` is at most 256.
  void prepare_codes(const float* code, int64_t code_size) { prepare_limits(code, code_size); }

  // Any number of values, and NaN among them gets code 0. `finite`: that all are finite.
  template <class T>
  void quantize(const T* x, float scale, bool finite, int64_t count, uint8_t* codes) const {
    constexpr int kPart = 64;
    if (!finite || !searchable(scale)) {
      return encode_each(x, scale, count, codes);
    }
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) {
      encode_block<kBlock>(x + i, scale, codes + i);
    }
    for (; i + kPart <= count; i += kPart) {
      encode_block<kPart>(x + i, scale, codes + i);
    }
    if (i < count) {
      T values[kPart] = {};
      uint8_t padded[kPart];
      memcpy(values, x + i, static_cast<size_t>(count - i) * sizeof(T));
      encode_block<kPart>(values, scale, padded);
      memcpy(codes + i, padded, static_cast<size_t>(count - i));
    }
  }

  // `values` has room for a whole block.
  void decode(const uint8_t* codes, float absmax, int count, float* values) const {
    if (count == kBlock) {
      return decode_block(codes, absmax, values);
    }
    alignas(64) uint8_t padded[kBlock] = {};
    memcpy(padded, codes, static_cast<size_t>(count));
    decode_block(padded, absmax, values);
  }

  // absmax: that of the values, which are all finite. Values after the last one may be overwritten.
  void encode(float* values, float absmax, int count, uint8_t* codes) const {
    if (absmax == 0.0f) {
      memset(codes, 0, static_cast<size_t>(count));
      return;
    }
    const float scale = 1.0f / absmax;
    if (!searchable(scale)) {
      encode_each(values, scale, count, codes);
    } else if (count == kBlock) {
      encode_block<kBlock>(values, scale, codes);
    } else {
      memset(values + count, 0, static_cast<size_t>(kBlock - count) * sizeof(float));
      alignas(64) uint8_t padded[kBlock];
      encode_block<kBlock>(values, scale, padded);
      memcpy(codes, padded, static_cast<size_t>(count));
    }
  }

 private:
  using Words = __m512i;
  static constexpr int kCodes = 256;

  // Both interleaving and packing work inside of 128-bit lanes; this order of dwords makes up for it.
  BNB_FN Words transposed(Words a) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a);
  }

  // --- codes to values ---
  //
  // A plane holds the same byte or word of every value.

#if defined(__AVX512VBMI__)
  static constexpr int kPlanes = 4;
  using Part = uint8_t;
#else
  static constexpr int kPlanes = 2;
  using Part = uint16_t;
#endif
  static constexpr int kParts = 64 / sizeof(Part);  // in a register
  static constexpr int kTables = kCodes / kParts;   // registers of a plane

  BNB_FN void put_scaled(float* to, Words bits, __m512 scale) {
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_castsi512_ps(bits), scale));
  }

  void decode_block(const uint8_t* codes, float absmax, float* values) const {
    Words table[kPlanes][kTables];
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (int i = 0; i < kTables; ++i) {
        table[plane][i] = _mm512_load_si512(planes_[plane] + i * kParts);
      }
    }
    const __m512 scale = _mm512_set1_ps(absmax);
    for (int i = 0; i < kBlock; i += kParts) {
      Words part[kPlanes];
#if defined(__AVX512VBMI__)
      const Words index = transposed(_mm512_loadu_si512(codes + i));
      const __mmask64 upper = _mm512_movepi8_mask(index);
      for (int plane = 0; plane < kPlanes; ++plane) {
        part[plane] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[plane][0], index, table[plane][1]),
                                             _mm512_permutex2var_epi8(table[plane][2], index, table[plane][3]));
      }
      const Words low0 = _mm512_unpacklo_epi8(part[0], part[1]), low1 = _mm512_unpackhi_epi8(part[0], part[1]);
      const Words high0 = _mm512_unpacklo_epi8(part[2], part[3]), high1 = _mm512_unpackhi_epi8(part[2], part[3]);
      put_scaled(values + i, _mm512_unpacklo_epi16(low0, high0), scale);
      put_scaled(values + i + 16, _mm512_unpackhi_epi16(low0, high0), scale);
      put_scaled(values + i + 32, _mm512_unpacklo_epi16(low1, high1), scale);
      put_scaled(values + i + 48, _mm512_unpackhi_epi16(low1, high1), scale);
#else
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
      const Words order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
      const Words index = _mm512_permutexvar_epi64(order, _mm512_cvtepu8_epi16(bytes));
      const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
      const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
      for (int plane = 0; plane < kPlanes; ++plane) {
        Words quarter[4];
        for (int j = 0; j < 4; ++j) {
          quarter[j] = _mm512_permutex2var_epi16(table[plane][2 * j], index, table[plane][2 * j + 1]);
        }
        part[plane] = _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]),
                                              _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]));
      }
      put_scaled(values + i, _mm512_unpacklo_epi16(part[0], part[1]), scale);
      put_scaled(values + i + 16, _mm512_unpackhi_epi16(part[0], part[1]), scale);
#endif
    }
  }

  // --- values to codes ---
  //
  // The code of a grid position is `base_` plus the number of limits below the position. A binary search
  // over 255 limits: five steps among every eighth limit, three among the seven in between.

  void prepare_limits(const float* qmap, int64_t code_size) {
    int position = 0, known = 0;
    base_ = 0;
    for (int64_t i = 0; i + 1 < code_size; ++i) {
      position = first_position_above(bnb::midpoint_8bit(qmap[i], qmap[i + 1]), position);
      if (position == 0) {
        ++base_;
      } else {
        limits_[known++] = static_cast<uint16_t>(position - 1);
      }
    }
    while (known < kCodes) {
      limits_[known++] = 0xffff;  // no position is above it
    }
    first_ = limits_[8 * 15 + 7];
    for (int i = 0; i < 32; ++i) {
      for (int step = 0; step < 4; ++step) {
        const int at = i + (8 >> step) - 1;
        coarse_[step][i] = at < 32 ? limits_[8 * at + 7] : 0;
      }
      fourth_[i] = limits_[8 * i + 3];
      for (int bit2 = 0; bit2 < 2; ++bit2) {
        const int at = 8 * i + 4 * bit2;
        middle_[32 * bit2 + i] = limits_[at + 1];
        even_[32 * bit2 + i] = limits_[at];
        odd_[32 * bit2 + i] = limits_[at + 2];
      }
    }
  }

  uint8_t code_at(int position) const {
    int code = 0;
    for (int step = kCodes / 2; step != 0; step /= 2) {
      code += limits_[code + step - 1] < position ? step : 0;
    }
    return static_cast<uint8_t>(base_ + code);
  }

  // A subnormal absmax may have no reciprocal, and then zeros scale to NaN.
  bool searchable(float scale) const { return base_ == 0 && bnb::magnitude_bits(scale) < 0x7f800000u; }

  template <class T>
  void encode_each(const T* x, float scale, int64_t count, uint8_t* codes) const {
    for (int64_t i = 0; i < count; ++i) {
      const float scaled = bnb::to_float(x[i]) * scale;
      codes[i] = bnb::is_nan(scaled) ? 0 : code_at(bnb::grid_position(scaled));
    }
  }

  BNB_FN Words lookup64(const uint16_t* table, Words index) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(table), index, _mm512_load_si512(table + 32));
  }

  // As bnb::grid_position. `scaled` comes so close to [-1, 1] that it is on the grid without clamping, and for
  // all values of the sum the fused operation gives the same integer as two roundings.
  BNB_FN Words position_of(F32 scaled) {
    return truncate(fma(scaled + splat(1.0f), splat(bnb::kGridScale), splat(0.5f))).v;
  }

  // base_ is 0 and the scaled values are finite. A search waits for each of its steps, so those of all values
  // of the block run side by side.
  template <int kCount, class T>
  void encode_block(const T* values, float scale, uint8_t* codes) const {
    constexpr int kChains = kCount / 32;
    Words position[kChains], at[kChains], code[kChains], limit[kChains], upper_limit[kChains];
    __mmask32 above[kChains];
    const auto compare = [&] {
      for (int j = 0; j < kChains; ++j) {
        above[j] = _mm512_cmpgt_epu16_mask(position[j], limit[j]);
      }
    };
    const auto add_above = [&](Words* to, int what) {
      for (int j = 0; j < kChains; ++j) {
        to[j] = _mm512_mask_add_epi16(to[j], above[j], to[j], _mm512_set1_epi16(static_cast<int16_t>(what)));
      }
    };
    const F32 factor = splat(scale);
    for (int j = 0; j < kChains; ++j) {
      const T* from = values + 32 * j;
      position[j] = _mm512_packus_epi32(position_of(load(from) * factor), position_of(load(from + 16) * factor));
      limit[j] = _mm512_set1_epi16(static_cast<int16_t>(first_));
    }
    compare();
    for (int j = 0; j < kChains; ++j) {
      at[j] = _mm512_maskz_mov_epi16(above[j], _mm512_set1_epi16(16));
    }
    for (int step = 0; step < 4; ++step) {
      const Words table = _mm512_load_si512(coarse_[step]);
      for (int j = 0; j < kChains; ++j) {
        limit[j] = _mm512_permutexvar_epi16(at[j], table);
      }
      compare();
      add_above(at, 8 >> step);
    }
    const Words fourth = _mm512_load_si512(fourth_);
    for (int j = 0; j < kChains; ++j) {
      limit[j] = _mm512_permutexvar_epi16(at[j], fourth);
      code[j] = _mm512_slli_epi16(at[j], 3);
    }
    compare();
    add_above(at, 32);
    add_above(code, 4);
    for (int j = 0; j < kChains; ++j) {
      limit[j] = lookup64(middle_, at[j]);
      upper_limit[j] = lookup64(odd_, at[j]);
      at[j] = lookup64(even_, at[j]);
    }
    compare();
    add_above(code, 2);
    for (int j = 0; j < kChains; ++j) {
      limit[j] = _mm512_mask_blend_epi16(above[j], at[j], upper_limit[j]);
    }
    compare();
    add_above(code, 1);
    for (int j = 0; j < kChains; j += 2) {
      _mm512_storeu_si512(codes + 32 * j, transposed(_mm512_packus_epi16(code[j], code[j + 1])));
    }
  }

  alignas(64) Part planes_[kPlanes][kCodes];
  alignas(64) uint16_t coarse_[4][32];
  alignas(64) uint16_t fourth_[32];
  alignas(64) uint16_t middle_[64];
  alignas(64) uint16_t even_[64];
  alignas(64) uint16_t odd_[64];
  uint16_t limits_[kCodes];
  uint16_t first_;
  int base_;
};

}  // namespace BNB_ISA
}  // namespace bnb_cpu
