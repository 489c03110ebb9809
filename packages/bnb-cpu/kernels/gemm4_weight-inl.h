// The packed 4-bit weight of a product: how rows of it are decoded.
//
// Order of elements. A vector of dwords holds a group of 8 * kLanes codes. Shifting it right by four bits
// at a time and looking up the low nibbles gives eight vectors of values, without a shuffle: vector i has,
// in lane l, element 8 * l + (i ^ 1) of the group (the earlier of two codes lies in the high nibble).
// Activations are brought into this "grouped" order once per call. Where a row does not consist of
// whole dwords, or a dword may straddle two blocks, rows are decoded in plain order instead.
#pragma once

#include "embedding4-inl.h"
#include "gemm-inl.h"
#if defined(__AVX512VBMI__)
#include "planes_avx512-inl.h"
#endif

namespace bnb_cpu {
namespace BNB_ISA {

constexpr int64_t kGroup = 8 * kLanes;

// Place of element k of a row in grouped order.
BNB_FN int64_t grouped(int64_t k) {
  const int64_t inside = k % kGroup;
  return k - inside + ((inside % 8) ^ 1) * kLanes + inside / 8;
}

// The same where dwords are taken apart into words: vector i of a group has element 4 * w + (i ^ 1) in word w.
BNB_FN int64_t grouped_words(int64_t k) {
  const int64_t inside = k % kGroup;
  return k - inside + ((inside % 4) ^ 1) * 2 * kLanes + inside / 4;
}

// Most elements of a row whose absmax values are expanded at a time.
constexpr int64_t kChunk = 2048;
constexpr int64_t kMaxScales = kChunk / 8 + 2;

// The absmax of each block, plain or nested.
struct Absmax4 {
  const float* absmax;
  const uint8_t* absmax_8bit;  // null: plain
  const float* code;           // 256 entries
  const uint8_t* planes;       // their bytes, where these are looked up
  float offset;
  int64_t blocks;

  float operator()(int64_t block) const {
    return absmax_8bit == nullptr
               ? absmax[block]
               : bnb::nested_absmax(code[absmax_8bit[block]], absmax[block / kNestedBlocksize], offset);
  }

  // Values of blocks [first, first + count), and room for a vector to be read from any of them on. `buffer`
  // has kMaxScales + kLanes entries.
  BNB_MEMBER const float* expand(int64_t first, int64_t count, float* buffer) const {
    if (absmax_8bit == nullptr) {
      if (first + count + kLanes <= blocks) {
        return absmax + first;
      }
      memcpy(buffer, absmax + first, static_cast<size_t>(count) * sizeof(float));
    } else {
      const Table256 table(code);
      for (int64_t i = 0; i < count;) {
        const int64_t block = first + i;
        const int64_t stop = min_of(count, (block / kNestedBlocksize + 1) * kNestedBlocksize - first);
        const float outer = absmax[block / kNestedBlocksize];
#if defined(__AVX512VBMI__)
        // Often there are fewer, and the compiler loads the planes even for none.
        if (i + 4 * kLanes <= stop) {
          const Planes256 tables(planes);
          for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
            F32 found[4];
            lookup64(tables, absmax_8bit + first + i, found);
            for (int j = 0; j < 4; ++j) {
              store(buffer + i + j * kLanes, found[j] * splat(outer) + splat(offset));
            }
          }
        }
#endif
        for (; i + kLanes <= stop; i += kLanes) {
          store(buffer + i, lookup(table, load_bytes(absmax_8bit + first + i)) * splat(outer) + splat(offset));
        }
        for (; i < stop; ++i) {
          buffer[i] = bnb::nested_absmax(code[absmax_8bit[first + i]], outer, offset);
        }
      }
    }
    memset(buffer + count, 0, kLanes * sizeof(float));
    return buffer;
  }

  static constexpr int64_t kNestedBlocksize = 256;
};

struct Weight4 {
  const uint8_t* packed;
  int64_t rows, width;
  int64_t blocksize;
  const float* values;  // 16
  Absmax4 absmax;
  bool grouped_order;
  int shift;  // log2(blocksize), in grouped order

  int64_t padded_width() const { return round_up(width, kGroup); }
};

BNB_FN Weight4 make_weight4(const uint8_t* packed, int64_t rows, int64_t width, int64_t blocksize, const float* values,
                            Absmax4 absmax) {
  absmax.blocks = ceil_divide(rows * width, blocksize);
  int shift = 0;
  while (shift < 62 && (int64_t{1} << shift) < blocksize) {
    ++shift;
  }
  const bool whole_dwords = width % 8 == 0 && blocksize >= 8 && (int64_t{1} << shift) == blocksize;
  // Lanes beyond the end of a row decode code 0 and are multiplied by zero.
  const bool padding_vanishes = width % kGroup == 0 || bnb::magnitude_bits(values[0]) < 0x7f800000u;
  return {packed, rows, width, blocksize, values, absmax, whole_dwords && padding_vanishes, shift};
}

// --- scales by lane ----------------------------------------------------------------------------------

// Expanded absmax of a stretch of a row, and the factor of each lane of a group in it.
struct Scales4 {
  const float* scales;
  int64_t base;  // of the first one, in elements of the flattened weight
  int64_t blocksize;
  int shift;

  float of_element(int64_t element) const { return scales[(element - base) >> shift]; }

  // Of the lanes of a group that begins at `element`.
  BNB_MEMBER F32 of_group(int64_t element) const {
    const int64_t inside = element - base, position = inside & (blocksize - 1);
    const float* from = scales + (inside >> shift);
    if (position + kGroup <= blocksize) {
      return splat(*from);
    }
    if (blocksize >= kGroup) {
      const float boundary = static_cast<float>(blocksize - position);
      return select(lane_elements() < splat(boundary), splat(from[0]), splat(from[1]));
    }
    return spread(from, static_cast<int32_t>(position));
  }

 private:
  // First element of each lane's dword.
  static F32 lane_elements() {
    float elements[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      elements[lane] = static_cast<float>(8 * lane);
    }
    return load(elements);
  }

  F32 spread(const float* from, int32_t position) const {
#if defined(__AVX512F__)
    const __m512i elements = _mm512_add_epi32(
        _mm512_set1_epi32(position), _mm512_set_epi32(120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0));
    return {_mm512_permutexvar_ps(_mm512_srl_epi32(elements, _mm_cvtsi32_si128(shift)), _mm512_loadu_ps(from))};
#elif defined(__AVX2__)
    const __m256i elements =
        _mm256_add_epi32(_mm256_set1_epi32(position), _mm256_set_epi32(56, 48, 40, 32, 24, 16, 8, 0));
    return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), _mm256_srl_epi32(elements, _mm_cvtsi32_si128(shift)))};
#else
    float factors[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      factors[lane] = from[(position + 8 * lane) >> shift];
    }
    return load(factors);
#endif
  }
};

// Of `count` elements from one of a row on. The rows of a weight follow each other without a gap.
BNB_FN Scales4 scales_of(const Weight4& weight, int64_t row, int64_t k, int64_t count, float* buffer) {
  const int64_t element = row * weight.width + k;
  const int64_t first = element >> weight.shift, last = (element + count - 1) >> weight.shift;
  return {weight.absmax.expand(first, last - first + 1, buffer), first << weight.shift, weight.blocksize, weight.shift};
}

// Panels take a short stretch of many rows, which the processor does not foresee. Each row is asked for while the
// one so many rows before it is decoded.
constexpr int64_t kPrefetchRows = 4;

// --- codes ---------------------------------------------------------------------------------------------

BNB_FN I32 load_dwords(const uint8_t* bytes) {
#if defined(__AVX2__)
  return load(reinterpret_cast<const int32_t*>(bytes));
#else
  int32_t dwords[kLanes];
  memcpy(dwords, bytes, sizeof dwords);
  return load(dwords);
#endif
}

// All bits in the first `count` lanes.
BNB_FN I32 lane_mask(int64_t count) {
#if defined(__AVX512F__)
  return {_mm512_maskz_set1_epi32(static_cast<__mmask16>((1u << count) - 1), -1)};
#elif defined(__AVX2__)
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
#else
  int32_t lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = lane < count ? -1 : 0;
  }
  return load(lanes);
#endif
}

// The first `count` dwords; the other lanes are zero.
BNB_FN I32 load_dwords(const uint8_t* bytes, int64_t count) {
#if defined(__AVX512F__)
  return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), bytes)};
#elif defined(__AVX2__)
  return {_mm256_maskload_epi32(reinterpret_cast<const int*>(bytes), lane_mask(count).v)};
#else
  int32_t dwords[kLanes] = {};
  memcpy(dwords, bytes, static_cast<size_t>(count) * sizeof(int32_t));
  return load(dwords);
#endif
}

#ifdef BNB_AVX512BF16
// Words of `low`, then of `high`, rounded to bfloat16.
BNB_FN __m512i round_words(F32 low, F32 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }

// Looks up the low nibble of each word: in the first half of the table for the lower sixteen words, in the second
// half, which the fifth bit of an index chooses, for the others.
BNB_FN __m512i lookup_halves(__m512i codes, __m512i table) {
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  constexpr int kMaskThenOr = 0xea;
  const __m512i index = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(15), half, kMaskThenOr);
  return _mm512_permutexvar_epi16(index, table);
}
#endif

// Decodes elements [k, k + count) of a row to floats in grouped order, `count` rounded up to whole groups with
// zeros. `k` is a multiple of kGroup and `count` at most kChunk. put(offset, even, odd) takes two vectors,
// which belong at `offset` and kLanes after it.
template <class Put>
BNB_FN void decode_grouped(const Weight4& weight, const Table16& table, int64_t row, int64_t k, int64_t count,
                           const Put& put) {
  float buffer[kMaxScales + kLanes];
  const Scales4 scales = scales_of(weight, row, k, count, buffer);
  const int64_t element = row * weight.width + k;
  const uint8_t* from = weight.packed + element / 2;
  int64_t at = 0;
  for (; at + kGroup <= count; at += kGroup) {
    const F32 scale = scales.of_group(element + at);
    I32 codes = load_dwords(from + at / 2);
    prefetch(from + at / 2, kPrefetchRows * weight.width / 2);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      const F32 even = lookup(table, codes) * scale;
      codes = shift_right<4>(codes);
      put(at + i * kLanes, even, lookup(table, codes) * scale);
      codes = shift_right<4>(codes);
    }
  }
  if (at < count) {
    const int64_t dwords = (count - at) / 8;
    const I32 mask = lane_mask(dwords);
    const F32 scale = scales.of_group(element + at);
    I32 codes = load_dwords(from + at / 2, dwords);
    // Masked after the multiplication: the scale of a lane that is not there may be anything.
    for (int i = 0; i < 8; i += 2) {
      const F32 even = float_of(bits_of(lookup(table, codes) * scale) & mask);
      codes = shift_right<4>(codes);
      put(at + i * kLanes, even, float_of(bits_of(lookup(table, codes) * scale) & mask));
      codes = shift_right<4>(codes);
    }
  }
}

// Decodes elements [k, k + count) of a row in plain order, zeros up to `padded`.
BNB_FN void decode_plain(const Weight4& weight, const Table16& table, int64_t row, int64_t k, int64_t count,
                         int64_t padded, float* out) {
  const int64_t element = row * weight.width + k;
  decode_range_4bit(weight.packed, weight.absmax, element, element + count, weight.blocksize, table, weight.values,
                    out);
  memset(out + count, 0, static_cast<size_t>(padded - count) * sizeof(float));
}

// Decodes elements [k, k + count) of a row to floats in the order of the weight, zeros up to whole groups.
BNB_FN void decode_row(const Weight4& weight, const Table16& table, int64_t row, int64_t k, int64_t count, float* out) {
  if (weight.grouped_order) {
    decode_grouped(weight, table, row, k, count, [out](int64_t offset, F32 even, F32 odd) {
      store(out + offset, even);
      store(out + offset + kLanes, odd);
    });
  } else {
    decode_plain(weight, table, row, k, count, round_up(count, kGroup), out);
  }
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
