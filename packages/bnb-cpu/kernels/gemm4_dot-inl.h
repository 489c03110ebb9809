// Few rows of activations times a 4-bit weight: inner products along the rows of the weight. Codes go from
// memory through a look-up in registers into the multiply-adds and are never stored as floats.
#pragma once

#include "gemm4_weight-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Most activation rows that are multiplied in one pass over the weight.
constexpr int kDotRows = kLanes == 16 ? 8 : kLanes == 1 ? 2 : 4;

// Activations as floats, zeros up to whole groups: grouped order, or plain where the weight is decoded so.
template <class T>
void arrange_floats(const T* from, int64_t width, bool grouped_order, float* out) {
  const int64_t whole = width / kGroup * kGroup;
  if (!grouped_order) {
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      store(out + k, load(from + k));
    }
    for (; k < width; ++k) {
      out[k] = bnb::to_float(from[k]);
    }
    memset(out + width, 0, static_cast<size_t>(round_up(width, kGroup) - width) * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < whole; k += kGroup) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 8; ++i) {
        out[k + i * kLanes + lane] = bnb::to_float(from[k + 8 * lane + (i ^ 1)]);
      }
    }
  }
  if (whole < width) {
    memset(out + whole, 0, kGroup * sizeof(float));
    for (int64_t k = whole; k < width; ++k) {
      out[grouped(k)] = bnb::to_float(from[k]);
    }
  }
}

// --- float ---------------------------------------------------------------------------------------------

struct FloatDot {
  using Word = float;

  static int64_t words(int64_t elements) { return elements; }

  template <class T>
  static void arrange(const T* from, int64_t width, Word* out) {
    arrange_floats(from, width, true, out);
  }

  explicit FloatDot(const float* values) : table(values) {}

  // Adds the products of one group, of kWeights rows with kActs rows of activations.
  template <int kWeights, int kActs>
  void group(F32 (&sums)[kWeights][kActs], I32 (&codes)[kWeights], const F32 (&scales)[kWeights], const Word* acts,
             int64_t stride) const {
    if constexpr (kActs == 1) {
      // The scales go to the sum of the group: an eighth of the multiplications.
      F32 parts[kWeights];
      for (int r = 0; r < kWeights; ++r) {
        parts[r] = splat(0.0f);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const F32 act = load(acts + i * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kWeights; ++r) {
          parts[r] = fma(lookup(table, codes[r]), act, parts[r]);
          codes[r] = shift_right<4>(codes[r]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) {
        sums[r][0] = fma(parts[r], scales[r], sums[r][0]);
      }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < kWeights; ++r) {
          const F32 value = lookup(table, codes[r]) * scales[r];
          codes[r] = shift_right<4>(codes[r]);
#pragma GCC unroll 8
          for (int m = 0; m < kActs; ++m) {
            sums[r][m] = fma(value, load(acts + m * stride + i * kLanes), sums[r][m]);
          }
        }
      }
    }
  }

  Table16 table;
};

#ifdef BNB_AVX512BF16
// bfloat16 activations: the table is rounded to bfloat16, which is what rounding each weight to the dtype of
// the activations amounts to, and two products are added at a time in float.
struct BFloat16Dot {
  using Word = uint16_t;

  static int64_t words(int64_t elements) { return elements; }

  // Vector i of a group has, in word w, element 4 * w + (i ^ 1).
  static void arrange(const bnb::BFloat16* from, int64_t width, Word* out) {
    const int64_t whole = width / kGroup * kGroup;
    for (int64_t k = 0; k < whole; k += kGroup) {
      for (int w = 0; w < 32; ++w) {
        for (int i = 0; i < 4; ++i) {
          out[k + i * 32 + w] = from[k + 4 * w + (i ^ 1)].bits;
        }
      }
    }
    if (whole < width) {
      memset(out + whole, 0, kGroup * sizeof(Word));
      for (int64_t k = 0; k < width - whole; ++k) {
        out[whole + ((k % 4) ^ 1) * 32 + k / 4] = from[whole + k].bits;
      }
    }
  }

  explicit BFloat16Dot(const float* values) {
    uint16_t words[32];
    for (int i = 0; i < 32; ++i) {
      words[i] = bnb::to_bfloat16(values[i & 15]).bits;
    }
    table = _mm512_loadu_si512(words);
  }

  template <int kWeights, int kActs>
  void group(F32 (&sums)[kWeights][kActs], I32 (&codes)[kWeights], const F32 (&scales)[kWeights], const Word* acts,
             int64_t stride) const {
    F32 parts[kWeights][kActs];
    for (int r = 0; r < kWeights; ++r) {
      for (int m = 0; m < kActs; ++m) {
        parts[r][m] = splat(0.0f);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) {
        // Only five bits of an index count, and the table repeats itself after 16 entries.
        const __m512i value = _mm512_permutexvar_epi16(codes[r].v, table);
        codes[r].v = _mm512_srli_epi16(codes[r].v, 4);
#pragma GCC unroll 8
        for (int m = 0; m < kActs; ++m) {
          const __m512i act = _mm512_loadu_si512(acts + m * stride + i * 32);
          parts[r][m].v = _mm512_dpbf16_ps(parts[r][m].v, reinterpret_cast<__m512bh>(value),
                                           reinterpret_cast<__m512bh>(act));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < kActs; ++m) {
        sums[r][m] = fma(parts[r][m], scales[r], sums[r][m]);
      }
    }
  }

  __m512i table;
};
#endif

// Adds the products over elements [k, k + count) of kWeights weight rows, in grouped order, to
// sums[r * kActs + m].
template <class Dot, int kWeights, int kActs>
BNB_FN void dot_chunk(const Dot& dot, const Weight4& weight, int64_t row, int64_t k, int64_t count,
                      const typename Dot::Word* acts, int64_t stride, F32* totals) {
  F32 sums[kWeights][kActs];
  Scales4 scales[kWeights];
  float buffers[kWeights][kMaxScales + kLanes];
  const uint8_t* from[kWeights];
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) {
    scales[r] = scales_of(weight, row + r, k, count, buffers[r]);
    from[r] = weight.packed + ((row + r) * weight.width + k) / 2;
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      sums[r][m] = totals[r * kActs + m];
    }
  }
  const int64_t whole = count / kGroup * kGroup;
  for (int64_t at = 0; at < whole; at += kGroup) {
    I32 codes[kWeights];
    F32 factors[kWeights];
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r) {
      codes[r] = load_dwords(from[r] + at / 2);
      factors[r] = scales[r].of_group((row + r) * weight.width + k + at);
    }
    dot.template group<kWeights, kActs>(sums, codes, factors, acts + k + at, stride);
  }
  if (whole < count) {
    // Lanes beyond the row hold code 0, activations of zero and a scale of zero.
    const int64_t dwords = (count - whole) / 8;
    const I32 mask = lane_mask(dwords);
    I32 codes[kWeights];
    F32 factors[kWeights];
    for (int r = 0; r < kWeights; ++r) {
      codes[r] = load_dwords(from[r] + whole / 2, dwords);
      factors[r] = float_of(bits_of(scales[r].of_group((row + r) * weight.width + k + whole)) & mask);
    }
    dot.template group<kWeights, kActs>(sums, codes, factors, acts + k + whole, stride);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      totals[r * kActs + m] = sums[r][m];
    }
  }
}

// The same for a weight that is decoded in plain order.
template <int kActs>
void dot_row_plain(const Weight4& weight, const Table16& table, int64_t row, const float* acts, int64_t stride,
                   float* out) {
  F32 sums[kActs];
  for (int m = 0; m < kActs; ++m) {
    sums[m] = splat(0.0f);
  }
  float values[kChunk];
  for (int64_t k = 0; k < weight.width; k += kChunk) {
    const int64_t count = min_of(kChunk, weight.width - k), padded = round_up(count, kLanes);
    decode_plain(weight, table, row, k, count, padded, values);
    for (int64_t at = 0; at < padded; at += kLanes) {
      const F32 value = load(values + at);
#pragma GCC unroll 8
      for (int m = 0; m < kActs; ++m) {
        sums[m] = fma(value, load(acts + m * stride + k + at), sums[m]);
      }
    }
  }
  for (int m = 0; m < kActs; ++m) {
    out[m] = reduce_add(sums[m]);
  }
}

// Rows of the weight that go through one stretch of the activations together.
constexpr int64_t kDotBlock = 16;

// store(row, m, sum) for each weight row and each of kActs rows of activations.
template <class Dot, int kActs, class Store>
void dot_weight(const Weight4& weight, const typename Dot::Word* acts, int64_t stride, int threads,
                const Store& store) {
  constexpr int kWeights = kActs <= 2 ? 4 : kActs <= 4 || (kLanes == 16 && sizeof(typename Dot::Word) == 4) ? 2 : 1;
  // A stretch of the activations takes at most half of a first-level cache of 32 KiB.
  constexpr int64_t kFit = 16384 / (kActs * static_cast<int64_t>(sizeof(typename Dot::Word))) / kGroup * kGroup;
  constexpr int64_t kStretch = kFit < kChunk ? kFit : kChunk;
  const int64_t units = ceil_divide(weight.rows, kDotBlock);
  const int64_t parts = parts_of(threads, units, weight.rows * weight.width * kActs);
  parallel_parts(parts, units, [&](int64_t, int64_t begin, int64_t end) {
    const Dot dot(weight.values);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kDotBlock, rows = min_of(kDotBlock, weight.rows - first);
      F32 totals[kDotBlock * kActs];
      for (int64_t i = 0; i < kDotBlock * kActs; ++i) {
        totals[i] = splat(0.0f);
      }
      for (int64_t k = 0; k < weight.width; k += kStretch) {
        const int64_t count = min_of(kStretch, weight.width - k);
        int64_t r = 0;
        for (; r + kWeights <= rows; r += kWeights) {
          dot_chunk<Dot, kWeights, kActs>(dot, weight, first + r, k, count, acts, stride, totals + r * kActs);
        }
        for (; r < rows; ++r) {
          dot_chunk<Dot, 1, kActs>(dot, weight, first + r, k, count, acts, stride, totals + r * kActs);
        }
      }
      for (int64_t i = 0; i < rows * kActs; ++i) {
        store(first + i / kActs, i % kActs, reduce_add(totals[i]));
      }
    }
  });
}

template <int kActs, class Store>
void dot_weight_plain(const Weight4& weight, const float* acts, int64_t stride, int threads, const Store& store) {
  const int64_t parts = parts_of(threads, weight.rows, weight.rows * weight.width * kActs);
  parallel_parts(parts, weight.rows, [&](int64_t, int64_t begin, int64_t end) {
    const Table16 table(weight.values);
    float sums[kActs];
    for (int64_t row = begin; row < end; ++row) {
      dot_row_plain<kActs>(weight, table, row, acts, stride, sums);
      for (int m = 0; m < kActs; ++m) {
        store(row, m, sums[m]);
      }
    }
  });
}

template <class Dot, class T, class Store>
void dot_arranged(const Weight4& weight, const T* a, int64_t count, int threads, const Store& store) {
  using Word = typename Dot::Word;
  const int64_t stride = weight.padded_width();
  Scratch scratch(Scratch::bytes_for<Word>(count * stride));
  Word* const acts = scratch.take<Word>(count * stride);
  for (int64_t m = 0; m < count; ++m) {
    Dot::arrange(a + m * weight.width, weight.width, acts + m * stride);
  }
  with_count<kDotRows>(count, [&](auto rows) {
    dot_weight<Dot, decltype(rows)::value>(weight, acts, stride, threads, store);
  });
}

// `count` rows of activations, 1 to kDotRows.
template <class T, class Store>
void multiply_few(const Weight4& weight, const T* a, int64_t count, int threads, const Store& store) {
  if (!weight.grouped_order) {
    const int64_t stride = weight.padded_width();
    Scratch scratch(Scratch::bytes_for<float>(count * stride));
    float* const acts = scratch.take<float>(count * stride);
    for (int64_t m = 0; m < count; ++m) {
      arrange_floats(a + m * weight.width, weight.width, false, acts + m * stride);
    }
    with_count<kDotRows>(count, [&](auto rows) {
      dot_weight_plain<decltype(rows)::value>(weight, acts, stride, threads, store);
    });
    return;
  }
  dot_arranged<FloatDot>(weight, a, count, threads, store);
}

#ifdef BNB_AVX512BF16
template <class Store>
void multiply_few(const Weight4& weight, const bnb::BFloat16* a, int64_t count, int threads, const Store& store) {
  if (weight.grouped_order) {
    dot_arranged<BFloat16Dot>(weight, a, count, threads, store);
  } else {
    multiply_few<bnb::BFloat16, Store>(weight, a, count, threads, store);
  }
}
#endif

}  // namespace BNB_ISA
}  // namespace bnb_cpu
