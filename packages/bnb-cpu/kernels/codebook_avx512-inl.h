// The codebook of an 8-bit optimizer state, with all its tables in registers: permutes instead of loads.
// For AVX-512 BW; VBMI, where the build has it, looks up bytes.
#pragma once

#include "quant8-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

class Codebook {
 public:
  void prepare(const float* qmap) {
    memcpy(values_, qmap, sizeof values_);
    prepare_planes();
    prepare_limits(qmap);
  }

  void decode(const uint8_t* codes, float absmax, int count, float* values) const {
    const int whole = decode_whole(codes, absmax, count, values);
    for (int i = whole; i < count; ++i) {
      values[i] = values_[codes[i]] * absmax;
    }
  }

  // absmax: that of the values, which are all finite.
  void encode(const float* values, float absmax, int count, uint8_t* codes) const {
    if (absmax == 0.0f) {
      memset(codes, 0, static_cast<size_t>(count));
      return;
    }
    const float scale = 1.0f / absmax;
    // A subnormal absmax may have no reciprocal, and then zeros scale to NaN.
    const bool usual = base_ == 0 && bnb::magnitude_bits(scale) < 0x7f800000u;
    int i = 0;
    for (; usual && i + kStep <= count; i += kStep) {
      encode_step(*this, values + i, scale, codes + i);
    }
    for (; i < count; ++i) {
      const float scaled = values[i] * scale;
      codes[i] = bnb::is_nan(scaled) ? 0 : code_at(bnb::grid_position(scaled));
    }
  }

 private:
  using Words = __m512i;
  static constexpr int kCodes = 256;

  // --- codes to values ---

#if defined(__AVX512VBMI__)
  static constexpr int kPlanes = 4;
  using Part = uint8_t;
#else
  static constexpr int kPlanes = 2;
  using Part = uint16_t;
#endif
  static constexpr int kDecoded = 64 / sizeof(Part);  // codes per step
  static constexpr int kTables = kCodes / kDecoded;   // registers per plane

  // Plane p holds the p-th byte or word of every value.
  void prepare_planes() {
    for (int i = 0; i < kCodes; ++i) {
      const uint32_t bits = bnb::bits_of(values_[i]);
      for (int plane = 0; plane < kPlanes; ++plane) {
        planes_[plane][i] = static_cast<Part>(bits >> (32 / kPlanes * plane));
      }
    }
  }

  // Decodes whole steps and returns how many codes that were.
  int decode_whole(const uint8_t* codes, float absmax, int count, float* values) const {
    Words table[kPlanes][kTables];
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (int i = 0; i < kTables; ++i) {
        table[plane][i] = _mm512_load_si512(planes_[plane] + i * kDecoded);
      }
    }
    const __m512 scale = _mm512_set1_ps(absmax);
    int i = 0;
    for (; i + kDecoded <= count; i += kDecoded) {
#if defined(__AVX512VBMI__)
      // Interleaving works inside of 128-bit lanes; the order of dwords makes its results contiguous.
      const Words order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const Words index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + i));
      const __mmask64 upper = _mm512_movepi8_mask(index);
      Words part[kPlanes];
      for (int plane = 0; plane < kPlanes; ++plane) {
        part[plane] =
            _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[plane][0], index, table[plane][1]),
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
      Words part[kPlanes];
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
    return i;
  }

  BNB_FN void put_scaled(float* to, Words bits, __m512 scale) {
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_castsi512_ps(bits), scale));
  }

  // --- values to codes ---
  //
  // The code of a grid position is `base_` plus the number of limits below the position. A binary search
  // over 255 limits: five steps among every eighth limit, three among the seven in between.

  void prepare_limits(const float* qmap) {
    uint16_t limits[kCodes];
    int position = 0, known = 0;
    base_ = 0;
    for (int i = 0; i + 1 < kCodes; ++i) {
      position = first_position_above(bnb::midpoint_8bit(qmap[i], qmap[i + 1]), position);
      if (position == 0) {
        ++base_;
      } else {
        limits[known++] = static_cast<uint16_t>(position - 1);
      }
    }
    while (known < kCodes) {
      limits[known++] = 0xffff;  // no position is above it
    }
    memcpy(limits_, limits, sizeof limits_);
    for (int i = 0; i < 32; ++i) {
      for (int step = 0; step < 4; ++step) {
        const int at = i + (8 >> step) - 1;
        coarse_[step][i] = at < 32 ? limits[8 * at + 7] : 0;
      }
      for (int bit5 = 0; bit5 < 2; ++bit5) {
        const int at = 8 * i + 4 * bit5;
        middle_[32 * bit5 + i] = limits[at + 1];
        fine_[0][32 * bit5 + i] = limits[at];
        fine_[1][32 * bit5 + i] = limits[at + 2];
      }
      fourth_[i] = limits[8 * i + 3];
    }
  }

  uint8_t code_at(int position) const {
    int code = 0;
    for (int step = kCodes / 2; step != 0; step /= 2) {
      code += limits_[code + step - 1] < position ? step : 0;
    }
    return static_cast<uint8_t>(base_ + code);
  }

  BNB_FN Words add_where(Words a, __mmask32 where, int what) {
    return _mm512_mask_add_epi16(a, where, a, _mm512_set1_epi16(static_cast<int16_t>(what)));
  }

  BNB_FN Words lookup64(const uint16_t* table, Words index) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(table), index, _mm512_load_si512(table + 32));
  }

  // Values that encode_step takes. A search waits for each of its steps, so many of them run side by side.
  static constexpr int kStep = 256;

  // Scales and encodes kStep values.
  BNB_FN void encode_step(const Codebook& book, const float* values, float scale, uint8_t* codes) {
    constexpr int kChains = kStep / 32;
    const F32 factor = splat(scale);
    const Words first = _mm512_set1_epi16(static_cast<int16_t>(book.limits_[8 * 15 + 7]));
    Words position[kChains], at[kChains], code[kChains], limit[kChains], other[kChains];
    __mmask32 above[kChains];
    const auto compare = [&] {
      for (int j = 0; j < kChains; ++j) {
        above[j] = _mm512_cmpgt_epu16_mask(position[j], limit[j]);
      }
    };
    const auto add = [&](Words* to, int what) {
      for (int j = 0; j < kChains; ++j) {
        to[j] = _mm512_mask_add_epi16(to[j], above[j], to[j], _mm512_set1_epi16(static_cast<int16_t>(what)));
      }
    };
    for (int j = 0; j < kChains; ++j) {
      const float* from = values + 32 * j;
      position[j] = _mm512_packus_epi32(position_of(load(from) * factor).v, position_of(load(from + 16) * factor).v);
      limit[j] = first;
    }
    compare();
    for (int j = 0; j < kChains; ++j) {
      at[j] = _mm512_maskz_mov_epi16(above[j], _mm512_set1_epi16(16));
    }
    for (int step = 0; step < 4; ++step) {
      const Words table = _mm512_load_si512(book.coarse_[step]);
      for (int j = 0; j < kChains; ++j) {
        limit[j] = _mm512_permutexvar_epi16(at[j], table);
      }
      compare();
      add(at, 8 >> step);
    }
    const Words fourth = _mm512_load_si512(book.fourth_);
    for (int j = 0; j < kChains; ++j) {
      limit[j] = _mm512_permutexvar_epi16(at[j], fourth);
      code[j] = _mm512_slli_epi16(at[j], 3);
    }
    compare();
    add(at, 32);
    add(code, 4);
    for (int j = 0; j < kChains; ++j) {
      limit[j] = lookup64(book.middle_, at[j]);
      other[j] = lookup64(book.fine_[1], at[j]);
      at[j] = lookup64(book.fine_[0], at[j]);
    }
    compare();
    add(code, 2);
    for (int j = 0; j < kChains; ++j) {
      limit[j] = _mm512_mask_blend_epi16(above[j], at[j], other[j]);
    }
    compare();
    add(code, 1);
    // Packing works inside of 128-bit lanes; the order of dwords makes its results contiguous.
    const Words order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int j = 0; j < kChains; j += 2) {
      _mm512_storeu_si512(codes + 32 * j,
                          _mm512_permutexvar_epi32(order, _mm512_packus_epi16(code[j], code[j + 1])));
    }
  }

  // `scaled` comes so close to [-1, 1] that its position is on the grid without clamping.
  BNB_FN I32 position_of(F32 scaled) {
    return truncate(fma(scaled + splat(1.0f), splat(bnb::kGridScale), splat(0.5f)));
  }

  alignas(64) float values_[kCodes];
  alignas(64) Part planes_[kPlanes][kCodes];
  alignas(64) uint16_t limits_[kCodes];
  alignas(64) uint16_t coarse_[4][32];
  alignas(64) uint16_t fourth_[32];
  alignas(64) uint16_t middle_[64];
  alignas(64) uint16_t fine_[2][64];
  int base_;
};

}  // namespace BNB_ISA
}  // namespace bnb_cpu
