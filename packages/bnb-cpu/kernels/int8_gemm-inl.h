// Products of int8 matrices, exact modulo 2^32, and their way back to floating point.
#pragma once

#ifdef BNB_AMX
#include "gemm_amx-inl.h"
#endif
#include "int8_dot-inl.h"
#include "int8_quant-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// --- many rows -------------------------------------------------------------------------------------------

#if defined(BNB_AVX512VNNI) || defined(BNB_NEON_DOT)
// Four bytes to a word. In vectors of AVX-512 those along the lanes get 128 added, by which they become unsigned, and
// the sums lose 128 times the sum of the weight's row.
struct Int8Product {
  using Word = int32_t;
  static constexpr int kPerWord = 4;
#ifdef BNB_AMX
  using Tile = AmxTile<Int8Product>;
  static constexpr int32_t kOffset = 0;

  template <int kSums>
  static void dot() {
    amx_dot_int8<kSums>();
  }
#else
  using Tile = VectorTile<Int8Product>;
  using Sum = I32;
#if defined(BNB_NEON_DOT)
  static constexpr int32_t kOffset = 0;

  static I32 step(I32 sum, const Word* lanes, Word word) {
    return {vdotq_s32(sum.v, vreinterpretq_s8_s32(vld1q_s32(lanes)), vreinterpretq_s8_s32(vdupq_n_s32(word)))};
  }
#else
  static constexpr int32_t kOffset = 128;

  static I32 step(I32 sum, const Word* lanes, Word word) {
    return {_mm512_dpbusd_epi32(sum.v, _mm512_loadu_si512(lanes), _mm512_set1_epi32(word))};
  }
#endif
#endif
  static void copy_row(const int8_t* from, int64_t count, Word* out) { memcpy(out, from, static_cast<size_t>(count)); }
  static Word lane_word(const int8_t* from) {
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return static_cast<Word>(word ^ kOffsets);
  }
  static I32 lane_words(const int8_t* from) {
#if defined(BNB_NEON_DOT)
    return {vreinterpretq_s32_s8(vld1q_s8(from))};
#else
    return {_mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(static_cast<Word>(kOffsets)))};
#endif
  }

 private:
  static constexpr uint32_t kOffsets = kOffset * 0x01010101u;

 public:
#else
// Two int16 to a word.
struct Int8Product {
  using Word = int32_t;
  using Tile = VectorTile<Int8Product>;
  using Sum = I32;
  static constexpr int kPerWord = 2;
  static constexpr int32_t kOffset = 0;

  static I32 step(I32 sum, const Word* lanes, Word word) {
#if defined(__AVX512F__)
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(_mm512_loadu_si512(lanes), _mm512_set1_epi32(word)))};
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi32(word)))};
#elif defined(BNB_NEON)
    const int16x8_t pairs = vreinterpretq_s16_s32(vld1q_s32(lanes));
    const int16x8_t other = vreinterpretq_s16_s32(vdupq_n_s32(word));
    const int32x4_t low = vmull_s16(vget_low_s16(pairs), vget_low_s16(other));
    return {vaddq_s32(sum.v, vpaddq_s32(low, vmull_high_s16(pairs, other)))};
#else
    const int32_t product = low_half(*lanes) * low_half(word) + high_half(*lanes) * high_half(word);
    return sum + splat(product);
#endif
  }
  static void copy_row(const int8_t* from, int64_t count, Word* out) {
    int64_t k = 0;
    for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
      BNB_ISA::store(out + k / 2, lane_words(from + k));
    }
    for (; k + 2 <= count; k += 2) {
      out[k / 2] = lane_word(from + k);
    }
    if (k < count) {
      out[k / 2] = pair(from[k], 0);
    }
  }
  static Word lane_word(const int8_t* from) { return pair(from[0], from[1]); }
  static I32 lane_words(const int8_t* from) {
#if defined(__AVX512F__)
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
#elif defined(__AVX2__)
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
#elif defined(BNB_NEON)
    return {vreinterpretq_s32_s16(vmovl_s8(vld1_s8(from)))};
#else
    return {lane_word(from)};
#endif
  }

 private:
  static Word pair(int8_t first, int8_t second) {
    const uint32_t low = static_cast<uint16_t>(first), high = static_cast<uint16_t>(second);
    return static_cast<Word>(low | high << 16);
  }
  static int32_t low_half(Word word) { return static_cast<int16_t>(static_cast<uint32_t>(word)); }
  static int32_t high_half(Word word) { return static_cast<int16_t>(static_cast<uint32_t>(word) >> 16); }

 public:
#endif
  static I32 zero() { return splat(0); }
  static I32 load(const Word* p) { return BNB_ISA::load(p); }
  static void store(Word* p, I32 a) { BNB_ISA::store(p, a); }
};

// Steps [first, last) for `lane_count` lanes, one by one; rows have `count` elements from step 0 on.
BNB_FN void pack_int8_scalars(const int8_t* a, int64_t count, int64_t stride, int64_t lane_count, int64_t first,
                              int64_t last, int32_t* words, int64_t lanes) {
  constexpr int kPerWord = Int8Product::kPerWord;
  for (int64_t step = first; step < last; ++step) {
    const int64_t here = min_of(kPerWord, count - step * kPerWord);
    for (int64_t lane = 0; lane < lane_count; ++lane) {
      int8_t bytes[kPerWord] = {};
      memcpy(bytes, a + lane * stride + step * kPerWord, static_cast<size_t>(here));
      words[step * lanes + lane] = Int8Product::lane_word(bytes);
    }
  }
}

BNB_FN void pack_int8(const int8_t* a, int64_t width, int64_t lane_count, int64_t step, int64_t steps, int32_t* words,
                      int64_t lanes) {
  constexpr int kPerWord = Int8Product::kPerWord;
  const int64_t whole = min_of(steps, width / kPerWord - step);
  const int64_t last = min_of(steps, ceil_divide(width, kPerWord) - step);
  if (lane_count < lanes || last < steps) {
    memset(words, 0, static_cast<size_t>(steps * lanes) * sizeof *words);
  }
  const int8_t* const from = a + step * kPerWord;
  for (int64_t lane = 0; lane < lane_count; lane += kLanes) {
    const int64_t here = min_of(kLanes, lane_count - lane);
    int64_t s = 0;
    for (; s + kLanes <= whole; s += kLanes) {
      I32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < here ? Int8Product::lane_words(from + (lane + i) * width + s * kPerWord) : splat(0);
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i) {
        store(words + (s + i) * lanes + lane, block[i]);
      }
    }
    pack_int8_scalars(from + lane * width, width - step * kPerWord, width, here, s, last, words + lane, lanes);
  }
}

BNB_FN uint32_t sum_of_bytes(const int8_t* p, int64_t count) {
  uint32_t sum = 0;
  int64_t k = 0;
#if defined(BNB_AVX512VNNI)
  __m512i sums = _mm512_setzero_si512();
  for (; k + 64 <= count; k += 64) {
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(p + k));
  }
  sum = static_cast<uint32_t>(_mm512_reduce_add_epi32(sums));
#endif
  for (; k < count; ++k) {
    sum += static_cast<uint32_t>(static_cast<int32_t>(p[k]));
  }
  return sum;
}

// How many rows ahead the weight is asked for where its panels are widened. Where they are copied it gains nothing.
constexpr int64_t kInt8RowsAhead = 4;
constexpr int64_t kLineBytes = 64;

// finish(lane, lane_count, row, row_count, sums, stride) as in multiply_blocked.
template <class Finish>
void multiply_int8_many(const int8_t* a, const int8_t* b, int64_t count, int64_t rows, int64_t width, int threads,
                        const Finish& finish) {
  constexpr int kPerWord = Int8Product::kPerWord;
  multiply_blocked<Int8Product>(
      threads, count, rows, round_up(ceil_divide(width, kPerWord), Int8Product::Tile::kUnitSteps),
      [=](int64_t lane, int64_t lane_count, int64_t step, int64_t steps, int32_t* words, int64_t lanes) {
        pack_int8(a + lane * width, width, lane_count, step, steps, words, lanes);
      },
      [=](int64_t row, int64_t row_count, int64_t step, int64_t steps, int32_t* words, int64_t stride) {
        const int64_t k = step * kPerWord, elements = min_of(steps * kPerWord, width - k);
        const int64_t whole = elements / kPerWord;
        for (int64_t r = 0; r < row_count; ++r) {
          const int8_t* const from = b + (row + r) * width + k;
          int32_t* const to = words + r * stride;
          if (kPerWord < 4) {
            for (int64_t i = 0; i < elements; i += kLineBytes) {
              prefetch(from + i, kInt8RowsAhead * width);
            }
          }
          memset(to + whole, 0, static_cast<size_t>(steps - whole) * sizeof *to);
          Int8Product::copy_row(from, elements, to);
        }
      },
      [&](int64_t lane, int64_t lane_count, int64_t row, int64_t row_count, int32_t* sums, int64_t stride) {
        if (Int8Product::kOffset != 0) {
          for (int64_t r = 0; r < row_count; ++r) {
            const uint32_t total = sum_of_bytes(b + (row + r) * width, width) * Int8Product::kOffset;
            const I32 offset = splat(static_cast<int32_t>(total));
            for (int64_t l = 0; l < lane_count; l += kLanes) {
              store(sums + r * stride + l, load(sums + r * stride + l) - offset);
            }
          }
        }
        finish(lane, lane_count, row, row_count, sums, stride);
      });
}

// many(first, ...) and few(first, ...) are the two ways to take results for rows of `a` from `first` on.
template <class Many, class Few>
void multiply_int8(const int8_t* a, const int8_t* b, int64_t count, int64_t rows, int64_t width, int threads,
                   const Many& take_many, const Few& take_few) {
  if (count == 0 || rows == 0) {
    return;
  }
  const int64_t few = rows_apart<Int8Product::Tile>(count, Int8Dot::kRows);
  const int64_t many = count - few;
  if (many > 0) {
    multiply_int8_many(a, b, many, rows, width, threads, take_many);
  }
  if (few > 0) {
    multiply_int8_few(a + many * width, few, b, rows, width, threads,
                      [&](int64_t row, int64_t row_count, int64_t m, const int32_t* sums) {
                        take_few(row, row_count, many + m, sums);
                      });
  }
}

void int8_matmul(const int8_t* a, const int8_t* b, int64_t count, int64_t rows, int64_t width, int32_t* out,
                 int threads) {
  multiply_int8(
      a, b, count, rows, width, threads,
      [=](int64_t lane, int64_t lane_count, int64_t row, int64_t row_count, const int32_t* sums, int64_t stride) {
        store_transposed(sums, stride, lane_count, row_count, out + lane * rows + row, rows);
      },
      [=](int64_t row, int64_t row_count, int64_t m, const int32_t* sums) {
        memcpy(out + m * rows + row, sums, static_cast<size_t>(row_count) * sizeof *sums);
      });
}

// --- scaling ---------------------------------------------------------------------------------------------

// Of a product of two codes, and of one code.
constexpr float kProductScale = static_cast<float>(1.0 / (127.0 * 127.0));
constexpr float kCodeScale = static_cast<float>(1.0 / 127.0);

// What becomes of a sum: scales, bias, and the part of the outlier columns in floating point.
struct Int8Epilogue {
  const float* row_stats;  // `lanes` entries
  const float* col_stats;
  Bias bias;
  const int8_t* weight;  // rows of `width`, for the outlier columns
  int64_t width;
  const int64_t* outlier_columns;
  int64_t outlier_count;
  const float* outliers;  // outliers[i * lanes + row]
  int64_t lanes;          // rows of the product, rounded up to whole vectors

  float code(int64_t column, int64_t i) const {
    return static_cast<float>(weight[column * width + outlier_columns[i]]);
  }

  float value(int64_t row, int64_t column, int32_t sum) const {
    float value = static_cast<float>(sum) * (row_stats[row] * col_stats[column] * kProductScale);
    if (bias.given()) {
      value += bias[column];
    }
    return value;
  }

  // One row of the product.
  template <class T>
  void row(int64_t row, int64_t column, int64_t column_count, const int32_t* sums, T* out) const {
    float values[kInt8Block];
    int64_t c = 0;
    for (; c + kLanes <= column_count; c += kLanes) {
      const F32 factor = splat(row_stats[row]) * load(col_stats + column + c) * splat(kProductScale);
      const F32 scaled = to_float(load(sums + c)) * factor;
      store(values + c, bias.given() ? scaled + bias.lanes(column + c) : scaled);
    }
    for (; c < column_count; ++c) {
      values[c] = value(row, column + c, sums[c]);
    }
    for (c = 0; outlier_count > 0 && c < column_count; ++c) {
      float correction = 0.0f;
      for (int64_t i = 0; i < outlier_count; ++i) {
        correction += outliers[i * lanes + row] * code(column + c, i);
      }
      values[c] += correction * (col_stats[column + c] * kCodeScale);
    }
    for (c = 0; c + kLanes <= column_count; c += kLanes) {
      store(out + c, load(values + c));
    }
    for (; c < column_count; ++c) {
      bnb::from_float(values[c], out[c]);
    }
  }

  // Turns a block of sums into floats in place.
  void block(int64_t row, int64_t row_count, int64_t column, int64_t column_count, int32_t* sums,
             int64_t stride) const {
    for (int64_t c = 0; c < column_count; ++c) {
      int32_t* const from = sums + c * stride;
      float* const to = reinterpret_cast<float*>(from);
      const F32 scale = splat(col_stats[column + c]), product_scale = splat(kProductScale);
      const F32 term = splat(bias.given() ? bias[column + c] : 0.0f);
      for (int64_t r = 0; r < row_count; r += kLanes) {
        const F32 factor = load(row_stats + row + r) * scale * product_scale;
        const F32 scaled = to_float(load(from + r)) * factor;
        store(to + r, bias.given() ? scaled + term : scaled);
      }
      if (outlier_count > 0) {
        add_outliers(row, row_count, column + c, to);
      }
    }
  }

 private:
  void add_outliers(int64_t row, int64_t row_count, int64_t column, float* values) const {
    const F32 scale = splat(col_stats[column] * kCodeScale);
    for (int64_t r = 0; r < row_count; r += kLanes) {
      F32 correction = splat(0.0f);
      for (int64_t i = 0; i < outlier_count; ++i) {
        correction = fma(load(outliers + i * lanes + row + r), splat(code(column, i)), correction);
      }
      store(values + r, load(values + r) + correction * scale);
    }
  }
};

template <class X, class T>
void scaled_int8_product(const int8_t* a, const int8_t* b, const float* row_stats, const float* col_stats,
                         int64_t count, int64_t rows, int64_t width, const X* x, const int64_t* outlier_columns,
                         int64_t outlier_count, Bias bias, T* out, int threads) {
  const int64_t lanes = round_up(count, kLanes);
  Scratch scratch(Scratch::bytes_for<float>(lanes) + Scratch::bytes_for<float>(outlier_count * lanes));
  float* const stats = scratch.take<float>(lanes);
  float* const outliers = scratch.take<float>(outlier_count * lanes);
  for (int64_t row = 0; row < lanes; ++row) {
    stats[row] = row < count ? row_stats[row] : 0.0f;
  }
  for (int64_t row = 0; row < lanes && outlier_count > 0; ++row) {
    for (int64_t i = 0; i < outlier_count; ++i) {
      outliers[i * lanes + row] = row < count ? bnb::to_float(x[row * width + outlier_columns[i]]) : 0.0f;
    }
  }
  const Int8Epilogue epilogue{stats, col_stats, bias, b, width, outlier_columns, outlier_count, outliers, lanes};
  multiply_int8(
      a, b, count, rows, width, threads,
      [&](int64_t lane, int64_t lane_count, int64_t row, int64_t row_count, int32_t* sums, int64_t stride) {
        epilogue.block(lane, lane_count, row, row_count, sums, stride);
        store_transposed(reinterpret_cast<const float*>(sums), stride, lane_count, row_count, out + lane * rows + row,
                         rows);
      },
      [&](int64_t row, int64_t row_count, int64_t m, const int32_t* sums) {
        epilogue.row(m, row, row_count, sums, out + m * rows + row);
      });
}

void int8_scaled_mm(const int8_t* a, const int8_t* b, const float* row_stats, const float* col_stats, int64_t count,
                    int64_t rows, int64_t width, const void* x, const int64_t* outlier_columns, int64_t outlier_count,
                    const void* bias, int bias_dtype, void* out, int dtype, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    scaled_int8_product(a, b, row_stats, col_stats, count, rows, width, static_cast<const T*>(x), outlier_columns,
                        outlier_count, Bias{bias, bias_dtype}, static_cast<T*>(out), threads);
  });
}

void int8_linear(const void* x, int dtype, int64_t count, const int8_t* b, const float* col_stats, int64_t rows,
                 int64_t width, float threshold, const void* bias, int bias_dtype, void* out, int threads) {
  Scratch scratch(Scratch::bytes_for<int8_t>(count * width) + Scratch::bytes_for<float>(count) +
                  Scratch::bytes_for<int64_t>(width));
  int8_t* const codes = scratch.take<int8_t>(count * width);
  float* const stats = scratch.take<float>(count);
  int64_t* const columns = scratch.take<int64_t>(width);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(x);
    const int64_t outliers = quantize_int8_rows(from, count, width, threshold, codes, width, stats, columns, threads);
    scaled_int8_product(codes, b, stats, col_stats, count, rows, width, from, columns, outliers, Bias{bias, bias_dtype},
                        static_cast<T*>(out), threads);
  });
}

// --- scaling alone ---------------------------------------------------------------------------------------

void int8_mm_dequant(const int32_t* sums, const float* row_stats, const float* col_stats, int64_t rows, int64_t columns,
                     const void* bias, int bias_dtype, void* out, int dtype, int threads) {
  with_dtype(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    T* const to = static_cast<T*>(out);
    const Int8Epilogue epilogue{row_stats, col_stats, Bias{bias, bias_dtype}, nullptr, 0, nullptr, 0, nullptr, 0};
    parallel(threads, rows, grain_of(max_of(columns, 1)), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t c = 0; c < columns; c += kInt8Block) {
          const int64_t at = row * columns + c;
          epilogue.row(row, c, min_of(kInt8Block, columns - c), sums + at, to + at);
        }
      }
    });
  });
}

constexpr void fill_int8_gemm(Kernels& kernels) {
  kernels.int8_matmul = int8_matmul;
  kernels.int8_mm_dequant = int8_mm_dequant;
  kernels.int8_scaled_mm = int8_scaled_mm;
  kernels.int8_linear = int8_linear;
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
