// The two sides of a product with a 4-bit weight in the words of gemm-inl.h.
#pragma once

#include "gemm4_fixed-inl.h"
#ifdef BNB_AMX
#include "gemm_amx-inl.h"
#endif

namespace bnb_cpu {
namespace BNB_ISA {

// Decoded weights and activations as float.
struct FloatOperands {
  using Product = FloatProduct;
  using Word = float;
  static constexpr int kPerWord = 1;
  // Most rows of activations that gemm4_dot-inl.h takes.
  static constexpr int kFewRows = kDotRows;

  template <class T>
  static void set(Word* words, int64_t, T value) {
    words[0] = bnb::to_float(value);
  }

  // A row of the scalar side, in plain order. The words behind it are zero already.
  template <class T>
  static void copy_row(const T* from, int64_t count, Word* out) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      store(out + k, load(from + k));
    }
    for (; k < count; ++k) {
      out[k] = bnb::to_float(from[k]);
    }
  }

  // Words of consecutive elements of a row, kLanes of them, and the step of word i relative to the group that they
  // begin in; `k` is relative to the group too.
  template <class T>
  static F32 words_at(const T* from) {
    return load(from);
  }
  static int64_t step_of(int64_t k, int64_t i, bool grouped_order) { return grouped_order ? grouped(k + i) : k + i; }
  static F32 arranged(F32 words) { return words; }

  static int64_t place(int64_t k) { return grouped(k); }

  // Elements [k, k + count) of a row of the weight, zeros up to whole groups.
  static void decode(const Weight4& weight, const Table16& table, int64_t row, int64_t k, int64_t count, Word* out) {
    decode_row(weight, table, row, k, count, out);
  }

  // The same for the two rows that share words; here, one.
  static void decode_lanes(const Weight4& weight, const Table16& table, int64_t step, int64_t k, int64_t count,
                           Word* out) {
    decode_row(weight, table, step, k, count, out);
  }
};

#ifdef BNB_AVX512BF16
struct BFloat16Product {
  using Word = int32_t;
  static void store(Word* p, F32 a) { BNB_ISA::store(reinterpret_cast<float*>(p), a); }
#ifdef BNB_AMX
  using Tile = AmxTile<BFloat16Product>;
  template <int kSums>
  static void dot() {
    amx_dot_bfloat16<kSums>();
  }
#else
  using Tile = VectorTile<BFloat16Product>;
  using Sum = F32;
  static F32 zero() { return splat(0.0f); }
  static F32 load(const Word* p) { return BNB_ISA::load(reinterpret_cast<const float*>(p)); }
  static F32 step(F32 sum, const Word* lanes, Word word) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(lanes)),
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(word)))};
  }
#endif
};

// Both as pairs of bfloat16, the weight rounded from its product with absmax, as a layer with a
// dequantized weight has it. Subnormal numbers count as zero.
struct BFloat16Operands {
  using Product = BFloat16Product;
  using Word = int32_t;
  static constexpr int kPerWord = 2;
#ifdef BNB_AMX
  // Per element of the weight, decoding takes about a tenth of a cycle, and a dot product 1/32 for each row of
  // activations; the registers take 1/32 for all of 16 rows, and as much for the way of the weight through memory.
  // Below five rows there is next to nothing to gain, and the weight comes from memory no faster.
  static constexpr int kFewRows = 4;
#else
  static constexpr int kFewRows = kDotRows;
#endif

  static void set(Word* words, int64_t part, bnb::BFloat16 value) {
    memcpy(reinterpret_cast<char*>(words) + 2 * part, &value, sizeof value);
  }

  static void copy_row(const bnb::BFloat16* from, int64_t count, Word* out) {
    memcpy(out, from, static_cast<size_t>(count) * sizeof *from);
  }

  // Elements that share a word stand next to each other in plain order, and four apart in grouped order, where
  // each part of eight elements is rearranged.
  static F32 words_at(const bnb::BFloat16* from) { return {_mm512_castsi512_ps(_mm512_loadu_si512(from))}; }
  static int64_t step_of(int64_t k, int64_t i, bool grouped_order) {
    return grouped_order ? k / 8 + i / 4 + (i % 4) * kLanes : k / 2 + i;
  }
  static F32 arranged(F32 words) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_set_epi8(13, 12, 5, 4, 15, 14, 7, 6, 9, 8, 1, 0, 11, 10, 3, 2));
    return {_mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_castps_si512(words.v), order))};
  }

  static int64_t place(int64_t k) { return grouped_words(k); }

  static void decode(const Weight4& weight, const Table16& table, int64_t row, int64_t k, int64_t count, Word* out) {
    if (!weight.grouped_order) {
      float values[kChunk];
      decode_row(weight, table, row, k, count, values);
      for (int64_t at = 0; at < round_up(count, kGroup); at += 2 * kLanes) {
        _mm512_storeu_si512(out + at / 2, round_words(load(values + at), load(values + at + kLanes)));
      }
      return;
    }
    float buffer[kMaxScales + kLanes];
    const Scales4 scales = scales_of(weight, row, k, count, buffer);
    const int64_t element = row * weight.width + k, whole = count / kGroup * kGroup;
    const uint8_t* from = weight.packed + element / 2;
    if (weight.blocksize >= kGroup / 2 && element % (kGroup / 2) == 0) {
      decode_halves(scales, table, from, element, whole, kPrefetchRows * weight.width / 2, out);
    } else {
      for (int64_t at = 0; at < whole; at += kGroup) {
        const F32 scale = scales.of_group(element + at);
        decode_group(load_dwords(from + at / 2), scale, splat(-1), table, out + at / 2);
      }
    }
    if (whole < count) {
      const int64_t dwords = (count - whole) / 8;
      decode_group(load_dwords(from + whole / 2, dwords), scales.of_group(element + whole), lane_mask(dwords), table,
                   out + whole / 2);
    }
  }

  // A word holds the same element of two rows.
  static void decode_lanes(const Weight4& weight, const Table16& table, int64_t step, int64_t k, int64_t count,
                           Word* out) {
    const int64_t row = 2 * step;
    if (weight.grouped_order && weight.blocksize >= kGroup / 2 && weight.width % (kGroup / 2) == 0 &&
        row + 1 < weight.rows) {
      decode_two_rows(weight, table, row, k, count, out);
      return;
    }
    float first[kChunk], second[kChunk];
    const int64_t padded = round_up(count, kGroup);
    decode_row(weight, table, row, k, count, first);
    if (row + 1 < weight.rows) {
      decode_row(weight, table, row + 1, k, count, second);
    } else {
      memset(second, 0, static_cast<size_t>(padded) * sizeof(float));
    }
    for (int64_t at = 0; at < padded; at += kLanes) {
      _mm512_storeu_si512(out + at, interleave(load(first + at), load(second + at)));
    }
  }

 private:
  // Rows of which each half of a group lies in one block: the four tables of a group are scaled and rounded, and one
  // look-up among their 64 entries gives both rows. The fifth bit of an index chooses the row, the sixth the half.
  static void decode_two_rows(const Weight4& weight, const Table16& table, int64_t row, int64_t k, int64_t count,
                              Word* out) {
    float buffers[2][kMaxScales + kLanes];
    const Scales4 first = scales_of(weight, row, k, count, buffers[0]);
    const Scales4 second = scales_of(weight, row + 1, k, count, buffers[1]);
    const int64_t element = row * weight.width + k;
    const uint8_t* const from = weight.packed + element / 2;
    const __m512i nibbles = _mm512_set1_epi32(0x000f000f), low_word = _mm512_set1_epi32(0xffff);
    const __m512i choice = _mm512_inserti64x4(_mm512_set1_epi32(0x00100000), _mm256_set1_epi32(0x00300020), 1);
    constexpr int kSelect = 0xca, kMaskThenOr = 0xea;
    for (int64_t at = 0; at < count; at += kGroup) {
      const int64_t dwords = min_of(kGroup, count - at) / 8;
      const bool whole = dwords == kLanes;
      const auto scaled = [&](int64_t half) {
        return round_words(scale(table, first.of_element(element + at + half)),
                           scale(table, second.of_element(element + weight.width + at + half)));
      };
      const __m512i low = scaled(0), high = whole ? scaled(kGroup / 2) : _mm512_setzero_si512();
      const uint8_t* const next = from + weight.width / 2;
      prefetch(from + at / 2, kPrefetchRows * weight.width / 2);
      prefetch(next + at / 2, kPrefetchRows * weight.width / 2);
      __m512i codes = (whole ? load_dwords(from + at / 2) : load_dwords(from + at / 2, dwords)).v;
      __m512i others = (whole ? load_dwords(next + at / 2) : load_dwords(next + at / 2, dwords)).v;
      others = _mm512_rol_epi32(others, 16);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512i both = _mm512_ternarylogic_epi32(low_word, codes, others, kSelect);
        const __m512i index = _mm512_ternarylogic_epi32(both, nibbles, choice, kMaskThenOr);
        _mm512_storeu_si512(out + at + i * kLanes, _mm512_permutex2var_epi16(low, index, high));
        codes = _mm512_srli_epi32(codes, 4);
        others = _mm512_ror_epi32(others, 4);
      }
    }
  }

  static F32 scale(const Table16& table, float factor) {
    return {_mm512_mul_ps(table.entries, _mm512_set1_ps(factor))};
  }

  // Words of lane l: low[l], high[l].
  static __m512i interleave(F32 low, F32 high) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index =
        _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(kLanes)), 16));
    return _mm512_permutexvar_epi16(index, round_words(low, high));
  }

  // One group: nibbles j and j + 4 of a dword are nibble j of its words.
  static void decode_group(I32 codes, F32 scale, I32 mask, const Table16& table, Word* out) {
    F32 values[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      values[i] = float_of(bits_of(lookup(table, codes) * scale) & mask);
      codes = shift_right<4>(codes);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_si512(out + j * kLanes, interleave(values[j], values[j + 4]));
    }
  }

  // Groups of which each half lies in one block: the table is scaled and rounded once per half, and one look-up
  // gives 32 weights.
  static void decode_halves(const Scales4& scales, const Table16& table, const uint8_t* from, int64_t element,
                            int64_t count, int64_t prefetch_distance, Word* out) {
    for (int64_t at = 0; at < count; at += kGroup) {
      prefetch(from + at / 2, prefetch_distance);
      const __m512i scaled = round_words(scale(table, scales.of_element(element + at)),
                                         scale(table, scales.of_element(element + at + kGroup / 2)));
      __m512i codes = _mm512_loadu_si512(from + at / 2);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        _mm512_storeu_si512(out + at / 2 + j * kLanes, lookup_halves(codes, scaled));
        codes = _mm512_srli_epi16(codes, 4);
      }
    }
  }
};
#endif

template <class T>
struct OperandsOf {
  using type = FloatOperands;
};
#ifdef BNB_AVX512BF16
template <>
struct OperandsOf<bnb::BFloat16> {
  using type = BFloat16Operands;
};
#endif

// Most rows of activations that multiply_few takes.
template <class T>
int64_t few_rows([[maybe_unused]] const Weight4& weight) {
#ifdef BNB_FIXED_DOT
  if (sizeof(T) == 2 && FixedDot::takes(weight)) {
    return kFixedRows;
  }
#endif
  return OperandsOf<T>::type::kFewRows;
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
