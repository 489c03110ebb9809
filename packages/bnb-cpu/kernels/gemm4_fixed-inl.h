// Few rows of half-precision activations times a 4-bit weight in 16-bit integers, on AVX2: a look-up of bytes finds 32
// values at a time where one of floats finds 8, and a multiplication takes 16.
//
// Both sides are integers of up to 2^14. The values of a codebook err by no more than 7.1e-5 of themselves. Activations
// count in units, one for each group of theirs: the power of two with which the largest has 14 bits. Of those that are
// not zero, at least three quarters of a group end up closer than rounding to their type could bring them, and the
// others closer than 2^-14 of the largest; where one stretch of integers does not reach that, arrange_fixed has a
// second one for what the first leaves, and rows that are still worse off stay with floats.
#pragma once

#include "gemm4_dot-inl.h"
#include "quant4-inl.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define BNB_FIXED_DOT

namespace bnb_cpu {
namespace BNB_ISA {

constexpr int kFixedBits = 14;

// A sum of a group has 8 products in each lane.
constexpr int64_t kMostFixed = int64_t{1} << kFixedBits;
static_assert(kGroup / kLanes * kMostFixed * (kMostFixed - 1) < INT32_MAX, "sums of a group would overflow");

// Multiples of 1 / scale that stand for the values of a codebook; 0 for one that is neither NF4 nor FP4. Of the scales
// below 2^14 these err least: by 7.1e-5 of a value of NF4, and for FP4, of multiples of 1/192, by the rounding to
// float.
BNB_FN float fixed_scale(const float* values) {
  constexpr size_t kBytes = 16 * sizeof(float);
  return memcmp(values, kNf4.values, kBytes) == 0   ? 14640.0f
         : memcmp(values, kFp4.values, kBytes) == 0 ? 85.0f * 192.0f
                                                    : 0.0f;
}

// --- products --------------------------------------------------------------------------------------------

struct FixedDot {
  using Word = int16_t;
  // Words of one row of activations, and its unit in all lanes.
  static constexpr int64_t kGroupWords = kGroup + 2 * kLanes;
  static constexpr bool kWholeGroups = true;

  template <int kActs>
  static constexpr int weights() {
    return kActs <= 2 ? 2 : 1;
  }

  // Each half of a group lies in one block, and in one half of the vectors.
  static bool takes(const Weight4& weight) {
    return weight.grouped_order && weight.width % kGroup == 0 && weight.blocksize >= kGroup / 2 &&
           fixed_scale(weight.values) != 0.0f;
  }

  explicit FixedDot(const float* values) {
    const float scale = fixed_scale(values);
    alignas(16) uint8_t low_bytes[16], high_bytes[16];
    for (int i = 0; i < 16; ++i) {
      const float scaled = values[i] * scale;
      const int word = static_cast<int>(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f);
      low_bytes[i] = static_cast<uint8_t>(word & 0xff);
      high_bytes[i] = static_cast<uint8_t>(word >> 8 & 0xff);
    }
    low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low_bytes)));
    high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high_bytes)));
  }

  using Factor = F32;
  Factor factor(const Scales4& scales, int64_t element) const {
    return scales.blocksize >= kGroup ? splat(scales.of_element(element)) : scales.of_group(element);
  }

  template <int kWeights, int kActs>
  void group(F32 (&sums)[kWeights][kActs], I32 (&codes)[kWeights], const Factor (&scales)[kWeights],
             const Word* acts) const {
    __m256i words[kWeights][4];
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r) {
      const __m256i nibbles = _mm256_set1_epi8(15);
      decode(_mm256_and_si256(_mm256_srli_epi16(codes[r].v, 4), nibbles), words[r]);
      decode(_mm256_and_si256(codes[r].v, nibbles), words[r] + 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      const Word* const act = acts + m * kGroupWords;
      const F32 unit = load(reinterpret_cast<const float*>(act + kGroup));
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) {
        I32 sum = multiply(words[r][0], act);
#pragma GCC unroll 4
        for (int i = 1; i < 4; ++i) {
          sum = sum + multiply(words[r][i], act + i * 2 * kLanes);
        }
        sums[r][m] = fma(to_float(sum) * unit, scales[r], sums[r][m]);
      }
    }
  }

 private:
  // Values of 32 codes: those of the first eight bytes of each half, then those of the others.
  void decode(__m256i codes, __m256i* words) const {
    const __m256i low_bytes = _mm256_shuffle_epi8(low, codes), high_bytes = _mm256_shuffle_epi8(high, codes);
    words[0] = _mm256_unpacklo_epi8(low_bytes, high_bytes);
    words[1] = _mm256_unpackhi_epi8(low_bytes, high_bytes);
  }

  static I32 multiply(__m256i words, const Word* act) {
    return {_mm256_madd_epi16(words, _mm256_load_si256(reinterpret_cast<const __m256i*>(act)))};
  }

  __m256i low, high;
};

// --- activations -----------------------------------------------------------------------------------------

BNB_FN F32 magnitude(F32 a) { return float_of(bits_of(a) & splat(0x7fffffff)); }

// What rounding to T leaves of a value at most, relative to it.
template <class T>
constexpr float kUnitRoundoff = 0x1p-8f;
template <>
constexpr float kUnitRoundoff<bnb::Half> = 0x1p-11f;

// A group of a row of activations on its way to integers.
class FixedGroup {
 public:
  template <class T>
  FixedGroup& load(const T* from) {
    for (int i = 0; i < 8; ++i) {
      rest_[i] = BNB_ISA::load(from + i * kLanes);
    }
    return *this;
  }

  // Writes the values as multiples of their unit and behind them, for all lanes, this unit times that of the codebook.
  // Keeps what the values have beyond that. False, with zeros written, if one is not finite or all are too small for
  // the product of the units.
  bool round(float code_unit, FixedDot::Word* out) {
    I32 most = splat(0);
    for (int i = 0; i < 8; ++i) {
      most = max(most, bits_of(magnitude(rest_[i])));
    }
    const int32_t most_bits = reduce_max(most), exponent = most_bits >> 23;
    if (exponent == 0xff || (exponent < kLeastExponent && most_bits != 0)) {
      memset(out, 0, FixedDot::kGroupWords * sizeof *out);
      return false;
    }
    const int32_t unit_exponent = most_bits == 0 ? 127 : exponent - (kFixedBits - 1);
    const F32 unit = float_of(splat(unit_exponent << 23)), inverse = float_of(splat((254 - unit_exponent) << 23));
    __m256i words[8];
    for (int i = 0; i < 8; ++i) {
      const I32 rounded = round_to_int(rest_[i] * inverse);
      rest_[i] = rest_[i] - to_float(rounded) * unit;
      words[i] = rounded.v;
    }
    store_words(words, out);
    store(reinterpret_cast<float*>(out + kGroup), unit * splat(code_unit));
    return true;
  }

  // Whether more than a quarter of the values that are not zero, which came from `from`, lack more than T rounds.
  template <class T>
  bool coarse(const T* from) const {
    I32 balance = splat(0);
    for (int i = 0; i < 8; ++i) {
      const F32 size = magnitude(BNB_ISA::load(from + i * kLanes));
      balance = balance + select(size * splat(kUnitRoundoff<T>) < magnitude(rest_[i]), splat(4), splat(0)) -
                select(splat(0.0f) < size, splat(1), splat(0));
    }
    return reduce_add(to_float(balance)) > 0.0f;
  }

 private:
  // The product of the units is a normal number.
  static constexpr int32_t kLeastExponent = 1 + (kFixedBits - 1) + kFixedBits;

  // In the order in which codes are decoded: in each half of the first two vectors eight of the even elements, in the
  // others the odd ones.
  static void store_words(const __m256i (&words)[8], FixedDot::Word* out) {
    const __m256i parity = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m256i parted[4];  // Of 16 elements, the even ones and then the odd ones.
    for (int i = 0; i < 4; ++i) {
      const __m256i plain = _mm256_permute4x64_epi64(_mm256_packs_epi32(words[2 * i], words[2 * i + 1]), 0xd8);
      parted[i] = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(plain, parity), 0xd8);
    }
    __m256i* const to = reinterpret_cast<__m256i*>(out);
    for (int i = 0; i < 2; ++i) {
      _mm256_store_si256(to + i, _mm256_permute2x128_si256(parted[i], parted[i + 2], 0x20));
      _mm256_store_si256(to + 2 + i, _mm256_permute2x128_si256(parted[i], parted[i + 2], 0x31));
    }
  }

  F32 rest_[8];
};

// Most rows of activations that share a decoded weight, and that are multiplied here.
constexpr int kFixedActs = 8;
constexpr int64_t kFixedRows = 24;

// Arranges `acts` rows of activations for FixedDot: group by group, all rows of each, and behind the last the groups
// that are multiplied once more. These are the groups that are coarse in some row, as where one activation is far
// larger than the others. Returns their number, and in `again` the elements that they begin at. left[m] says that row m
// cannot be had in this way: it is still coarse then, or not finite, or too small.
template <class T>
int64_t arrange_fixed(const T* from, int64_t width, int acts, float code_unit, FixedDot::Word* out, int64_t* again,
                      bool* left) {
  constexpr int64_t kWords = FixedDot::kGroupWords;
  FixedDot::Word* next = out + width / kGroup * acts * kWords;
  int64_t count = 0;
  for (int m = 0; m < acts; ++m) {
    left[m] = false;
  }
  for (int64_t k = 0; k < width; k += kGroup, out += acts * kWords) {
    FixedGroup groups[kFixedActs];
    bool coarse[kFixedActs], any = false;
    for (int m = 0; m < acts; ++m) {
      const T* const row = from + m * width + k;
      const bool rounded = groups[m].load(row).round(code_unit, out + m * kWords);
      left[m] = left[m] || !rounded;
      coarse[m] = rounded && groups[m].coarse(row);
      any = any || coarse[m];
    }
    if (!any) {
      continue;
    }
    for (int m = 0; m < acts; ++m) {
      FixedDot::Word* const to = next + m * kWords;
      if (!coarse[m]) {
        memset(to, 0, kWords * sizeof *to);
      } else if (!groups[m].round(code_unit, to) || groups[m].coarse(from + m * width + k)) {
        left[m] = true;
      }
    }
    next += acts * kWords;
    again[count++] = k;
  }
  return count;
}

template <class T, class Store>
void multiply_fixed(const Weight4& weight, const T* a, int64_t count, int threads, const Store& store) {
  int64_t first = 0;
  const auto store_row = [&](int64_t row, int64_t rows, int64_t m, const float* sums) {
    store(row, rows, first + m, sums);
  };
  const auto multiply_float = [&](const T* rows, int64_t row_count) {
    multiply_few<T, decltype(store_row)>(weight, rows, row_count, threads, store_row);
  };
  if (!FixedDot::takes(weight)) {
    multiply_float(a, count);
    return;
  }
  using Word = FixedDot::Word;
  const int64_t width = weight.width, groups = width / kGroup, piece = even_piece(count, kFixedActs, 1);
  const int64_t words = 2 * groups * piece * FixedDot::kGroupWords;
  Scratch scratch(Scratch::bytes_for<Word>(words) + Scratch::bytes_for<int64_t>(groups));
  Word* const acts = scratch.take<Word>(words);
  int64_t* const again = scratch.take<int64_t>(groups);
  const float code_unit = 1.0f / fixed_scale(weight.values);
  bool left[kFixedRows];
  for (; first < count; first += piece) {
    with_count<kFixedActs>(min_of(piece, count - first), [&](auto rows) {
      constexpr int kActs = decltype(rows)::value;
      const int64_t repeats = arrange_fixed(a + first * width, width, kActs, code_unit, acts, again, left + first);
      dot_weight<FixedDot, kActs>(weight, acts, Repeats{again, repeats}, threads, store_row);
    });
  }
  for (first = 0; first < count; ++first) {
    if (left[first]) {
      multiply_float(a + first * width, 1);
    }
  }
}

template <class Store>
void multiply_few(const Weight4& weight, const bnb::BFloat16* a, int64_t count, int threads, const Store& store) {
  multiply_fixed(weight, a, count, threads, store);
}
template <class Store>
void multiply_few(const Weight4& weight, const bnb::Half* a, int64_t count, int threads, const Store& store) {
  multiply_fixed(weight, a, count, threads, store);
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
#endif
