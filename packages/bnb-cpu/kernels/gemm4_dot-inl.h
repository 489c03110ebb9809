// Few rows of activations times a 4-bit weight: inner products along the rows of the weight. Codes go from
// memory through a look-up in registers into the multiply-adds and are never stored as floats.
#pragma once

#include "gemm4_weight-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Most activation rows that are multiplied in one pass over the weight.
constexpr int kDotRows = kLanes == 16 ? 8 : kLanes == 1 ? 2 : 4;

// Activations lie in memory as they are used: the vectors of element set 0 of all rows, then those of set 1, and
// so on. Row m of kActs rows, zeros up to whole groups.
template <int kActs, class T>
void arrange_floats(const T* from, int64_t width, int m, float* out) {
  for (int64_t k = 0; k < width; k += kGroup) {
    float* const to = out + k * kActs + m * kLanes;
    const int64_t lanes = min_of(kGroup, width - k) / 8;
    for (int i = 0; i < 8; ++i) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        to[i * kActs * kLanes + lane] = bnb::to_float(from[k + 8 * lane + (i ^ 1)]);
      }
      for (int64_t lane = lanes; lane < kLanes; ++lane) {
        to[i * kActs * kLanes + lane] = 0.0f;
      }
    }
  }
}

// The same in plain order.
template <int kActs, class T>
void arrange_plain(const T* from, int64_t width, int m, float* out) {
  for (int64_t k = 0; k < width; k += kLanes) {
    float* const to = out + k * kActs + m * kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      to[lane] = k + lane < width ? bnb::to_float(from[k + lane]) : 0.0f;
    }
  }
}

// --- float ---------------------------------------------------------------------------------------------

// Each kind says how many words a group of one row of activations takes, and whether rows consist of whole groups, of
// which some are multiplied once more.
struct FloatDot {
  using Word = float;
  static constexpr int64_t kGroupWords = kGroup;
  static constexpr bool kWholeGroups = false;

  // Rows of the weight that are multiplied together, for as many sums as there are registers.
  template <int kActs>
  static constexpr int weights() {
    return kActs <= 2 ? 4 : kActs <= 4 || kLanes == 16 ? 2 : 1;
  }

  template <int kActs, class T>
  static void arrange(const T* from, int64_t width, int m, Word* out) {
    arrange_floats<kActs>(from, width, m, out);
  }

  explicit FloatDot(const float* values) : table(values) {}

  // What a group is scaled with; in the second form, only the first `dwords` lanes are there.
  using Factor = F32;
  Factor factor(const Scales4& scales, int64_t element) const { return scales.of_group(element); }
  Factor factor(const Scales4& scales, int64_t element, int64_t dwords) const {
    return float_of(bits_of(scales.of_group(element)) & lane_mask(dwords));
  }

  // Adds the products of one group, of kWeights rows with kActs rows of activations.
  template <int kWeights, int kActs>
  void group(F32 (&sums)[kWeights][kActs], I32 (&codes)[kWeights], const Factor (&scales)[kWeights],
             const Word* acts) const {
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
        F32 values[kWeights];
#pragma GCC unroll 4
        for (int r = 0; r < kWeights; ++r) {
          values[r] = lookup(table, codes[r]) * scales[r];
          codes[r] = shift_right<4>(codes[r]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < kActs; ++m) {
          const F32 act = load(acts + (i * kActs + m) * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < kWeights; ++r) {
            sums[r][m] = fma(values[r], act, sums[r][m]);
          }
        }
      }
    }
  }

  Table16 table;
};

#ifdef BNB_AVX512BF16
// One vector of each weight row with one of each row of activations.
template <int kWeights, int kActs>
BNB_FN void add_products(F32 (&sums)[kWeights][kActs], const __m512i (&weights)[kWeights], const uint16_t* acts) {
#pragma GCC unroll 8
  for (int m = 0; m < kActs; ++m) {
    const __m512i act = _mm512_loadu_si512(acts + m * 32);
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r) {
      sums[r][m].v =
          _mm512_dpbf16_ps(sums[r][m].v, reinterpret_cast<__m512bh>(weights[r]), reinterpret_cast<__m512bh>(act));
    }
  }
}

// bfloat16 activations: the table is rounded to bfloat16, which errs as rounding each weight to the dtype of the
// activations does, and two products are added at a time in float.
struct BFloat16Dot {
  using Word = uint16_t;
  static constexpr int64_t kGroupWords = kGroup;
  static constexpr bool kWholeGroups = false;

  template <int kActs>
  static constexpr int weights() {
    return kActs <= 2 ? 4 : kActs <= 4 ? 2 : 1;
  }

  // Vector i of a group has, in word w, element 4 * w + (i ^ 1).
  template <int kActs>
  static void arrange(const bnb::BFloat16* from, int64_t width, int m, Word* out) {
    for (int64_t k = 0; k < width; k += kGroup) {
      Word* const to = out + k * kActs + m * 32;
      const int64_t words = min_of(kGroup, width - k) / 4;
      for (int i = 0; i < 4; ++i) {
        for (int64_t w = 0; w < words; ++w) {
          to[i * kActs * 32 + w] = from[k + 4 * w + (i ^ 1)].bits;
        }
        for (int64_t w = words; w < 32; ++w) {
          to[i * kActs * 32 + w] = 0;
        }
      }
    }
  }

  using Factor = F32;
  Factor factor(const Scales4& scales, int64_t element) const { return scales.of_group(element); }
  Factor factor(const Scales4& scales, int64_t element, int64_t dwords) const {
    return float_of(bits_of(scales.of_group(element)) & lane_mask(dwords));
  }

  explicit BFloat16Dot(const float* values) {
    uint16_t words[32];
    for (int i = 0; i < 32; ++i) {
      words[i] = bnb::to_bfloat16(values[i & 15]).bits;
    }
    table = _mm512_loadu_si512(words);
  }

  template <int kWeights, int kActs>
  void group(F32 (&sums)[kWeights][kActs], I32 (&codes)[kWeights], const Factor (&scales)[kWeights],
             const Word* acts) const {
    F32 parts[kWeights][kActs];
    for (int r = 0; r < kWeights; ++r) {
      for (int m = 0; m < kActs; ++m) {
        parts[r][m] = splat(0.0f);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512i values[kWeights];
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) {
        // Only five bits of an index count, and the table repeats itself after 16 entries.
        values[r] = _mm512_permutexvar_epi16(codes[r].v, table);
        codes[r].v = _mm512_srli_epi16(codes[r].v, 4);
      }
      add_products(parts, values, acts + i * kActs * 32);
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

// The same for more rows of activations, where scaling the table costs less than scaling the sums: the weight is
// rounded from its product with absmax. Each half of a group lies in one block.
struct ScaledBFloat16Dot {
  using Word = uint16_t;
  static constexpr int64_t kGroupWords = kGroup;
  static constexpr bool kWholeGroups = false;

  template <int kActs>
  static constexpr int weights() {
    return 2;
  }

  template <int kActs>
  static void arrange(const bnb::BFloat16* from, int64_t width, int m, Word* out) {
    BFloat16Dot::arrange<kActs>(from, width, m, out);
  }

  static bool takes(const Weight4& weight) {
    return weight.blocksize >= kGroup / 2 && weight.width % (kGroup / 2) == 0;
  }

  explicit ScaledBFloat16Dot(const float* values) : table(values) {}

  // The table scaled for both halves. A half that is not there gets a table of zeros.
  using Factor = __m512i;
  Factor factor(const Scales4& scales, int64_t element) const {
    return scaled(scales.of_element(element), scales.of_element(element + kGroup / 2));
  }
  Factor factor(const Scales4& scales, int64_t element, int64_t) const {
    return _mm512_maskz_mov_epi32(0x00ff, scaled(scales.of_element(element), 0.0f));
  }

  template <int kWeights, int kActs>
  void group(F32 (&sums)[kWeights][kActs], I32 (&codes)[kWeights], const Factor (&tables)[kWeights],
             const Word* acts) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512i values[kWeights];
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) {
        values[r] = lookup_halves(codes[r].v, tables[r]);
        codes[r].v = _mm512_srli_epi16(codes[r].v, 4);
      }
      add_products(sums, values, acts + i * kActs * 32);
    }
  }

  __m512i scaled(float low, float high) const {
    return round_words({_mm512_mul_ps(table.entries, _mm512_set1_ps(low))},
                       {_mm512_mul_ps(table.entries, _mm512_set1_ps(high))});
  }

  Table16 table;
};
#endif

// Rows of the weight that go through one stretch of the activations together.
constexpr int64_t kDotBlock = 16;

// Most statistics of a block of rows that are expanded together, with room for a block at each end.
constexpr int64_t kBlockScales = 4096 + 2;

// Groups that are multiplied once more: the elements that they begin at. Their activations follow those of whole rows.
struct Repeats {
  const int64_t* elements;
  int64_t count;
};

// Adds the products over elements [k, k + count) of kWeights weight rows, in grouped order, to
// totals[m * kDotBlock + r]. A stretch is too short for the processor to foresee it in the next rows.
// `expanded`: the statistics of these rows, or null. `acts`: the activations from element k on.
template <class Dot, int kWeights, int kActs>
void dot_chunk(const Dot& dot, const Weight4& weight, int64_t row, int64_t k, int64_t count, const Scales4* expanded,
               const typename Dot::Word* acts, F32* totals) {
  F32 sums[kWeights][kActs];
  Scales4 scales[kWeights];
  float buffers[kWeights][kMaxScales + kLanes];
  const uint8_t* from[kWeights];
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) {
    scales[r] = expanded != nullptr ? *expanded : scales_of(weight, row + r, k, count, buffers[r]);
    from[r] = weight.packed + ((row + r) * weight.width + k) / 2;
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      sums[r][m] = totals[m * kDotBlock + r];
    }
  }
  constexpr int64_t kWords = Dot::kGroupWords * kActs;
  const int64_t whole = count / kGroup * kGroup, ahead = prefetch_distance(kWeights * weight.width / 2);
  for (int64_t at = 0; at < whole; at += kGroup, acts += kWords) {
    I32 codes[kWeights];
    typename Dot::Factor factors[kWeights];
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r) {
      codes[r] = load_dwords(from[r] + at / 2);
      prefetch(from[r] + at / 2, ahead);
      factors[r] = dot.factor(scales[r], (row + r) * weight.width + k + at);
    }
    dot.template group<kWeights, kActs>(sums, codes, factors, acts);
  }
  if constexpr (!Dot::kWholeGroups) {
    if (whole < count) {
      // Lanes beyond the row hold code 0, activations of zero and a scale of zero.
      const int64_t dwords = (count - whole) / 8;
      I32 codes[kWeights];
      typename Dot::Factor factors[kWeights];
      for (int r = 0; r < kWeights; ++r) {
        codes[r] = load_dwords(from[r] + whole / 2, dwords);
        factors[r] = dot.factor(scales[r], (row + r) * weight.width + k + whole, dwords);
      }
      dot.template group<kWeights, kActs>(sums, codes, factors, acts);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      totals[m * kDotBlock + r] = sums[r][m];
    }
  }
}

// store(row, count, m, sums) takes the products of `count` weight rows with row m of the activations; sums has room
// for kDotBlock.
template <class Dot, int kActs, class Store>
void dot_weight(const Weight4& weight, const typename Dot::Word* acts, [[maybe_unused]] Repeats repeats, int threads,
                const Store& store) {
  constexpr int kWeights = Dot::template weights<kActs>();
  constexpr int64_t kWords = Dot::kGroupWords * kActs;
  // A stretch of the activations takes at most half of a first-level cache of 32 KiB.
  constexpr int64_t kFit = 16384 / (kWords * static_cast<int64_t>(sizeof(typename Dot::Word))) * kGroup;
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
      // Rows of one stretch have few statistics each, and nested ones want their codebook in registers: those of a
      // block are expanded at once.
      float buffer[kBlockScales + kLanes];
      const bool together = (rows * weight.width >> weight.shift) + 2 <= kBlockScales;
      const Scales4 scales = together ? scales_of(weight, first, 0, rows * weight.width, buffer) : Scales4{};
      const Scales4* const expanded = together ? &scales : nullptr;
      const auto add = [&](int64_t k, int64_t count, const typename Dot::Word* from) {
        int64_t r = 0;
        for (; r + kWeights <= rows; r += kWeights) {
          dot_chunk<Dot, kWeights, kActs>(dot, weight, first + r, k, count, expanded, from, totals + r);
        }
        for (; r < rows; ++r) {
          dot_chunk<Dot, 1, kActs>(dot, weight, first + r, k, count, expanded, from, totals + r);
        }
      };
      for (int64_t k = 0; k < weight.width; k += kStretch) {
        add(k, min_of(kStretch, weight.width - k), acts + k / kGroup * kWords);
      }
      if constexpr (Dot::kWholeGroups) {
        for (int64_t i = 0; i < repeats.count; ++i) {
          add(repeats.elements[i], kGroup, acts + (weight.padded_width() / kGroup + i) * kWords);
        }
      }
      for (int m = 0; m < kActs; ++m) {
        float sums[kDotBlock];
        for (int64_t r = 0; r < kDotBlock; r += kLanes) {
          BNB_ISA::store(sums + r, sums_of_lanes(totals + m * kDotBlock + r));
        }
        store(first, rows, m, sums);
      }
    }
  });
}

// The same for a weight that is decoded in plain order.
template <int kActs, class Store>
void dot_weight_plain(const Weight4& weight, const float* acts, int threads, const Store& store) {
  const int64_t units = ceil_divide(weight.rows, kDotBlock);
  const int64_t parts = parts_of(threads, units, weight.rows * weight.width * kActs);
  parallel_parts(parts, units, [&](int64_t, int64_t begin, int64_t end) {
    const Table16 table(weight.values);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kDotBlock, rows = min_of(kDotBlock, weight.rows - first);
      float sums[kActs][kDotBlock];
      for (int64_t r = 0; r < rows; ++r) {
        F32 totals[kActs];
        for (int m = 0; m < kActs; ++m) {
          totals[m] = splat(0.0f);
        }
        float values[kChunk];
        for (int64_t k = 0; k < weight.width; k += kChunk) {
          const int64_t count = min_of(kChunk, weight.width - k), padded = round_up(count, kLanes);
          decode_plain(weight, table, first + r, k, count, padded, values);
          for (int64_t at = 0; at < padded; at += kLanes) {
            const F32 value = load(values + at);
#pragma GCC unroll 8
            for (int m = 0; m < kActs; ++m) {
              totals[m] = fma(value, load(acts + (k + at) * kActs + m * kLanes), totals[m]);
            }
          }
        }
        for (int m = 0; m < kActs; ++m) {
          sums[m][r] = reduce_add(totals[m]);
        }
      }
      for (int m = 0; m < kActs; ++m) {
        store(first, rows, m, sums[m]);
      }
    }
  });
}

template <class Dot, class T, class Store>
void dot_arranged(const Weight4& weight, const T* a, int64_t count, int threads, const Store& store) {
  using Word = typename Dot::Word;
  const int64_t words = count * weight.padded_width();
  Scratch scratch(Scratch::bytes_for<Word>(words));
  Word* const acts = scratch.take<Word>(words);
  with_count<kDotRows>(count, [&](auto rows) {
    constexpr int kActs = decltype(rows)::value;
    for (int m = 0; m < kActs; ++m) {
      Dot::template arrange<kActs>(a + m * weight.width, weight.width, m, acts);
    }
    dot_weight<Dot, kActs>(weight, acts, Repeats{}, threads, store);
  });
}

// `count` rows of activations, 1 to kDotRows.
template <class T, class Store>
void multiply_few(const Weight4& weight, const T* a, int64_t count, int threads, const Store& store) {
  if (weight.grouped_order) {
    dot_arranged<FloatDot>(weight, a, count, threads, store);
    return;
  }
  const int64_t words = count * weight.padded_width();
  Scratch scratch(Scratch::bytes_for<float>(words));
  float* const acts = scratch.take<float>(words);
  with_count<kDotRows>(count, [&](auto rows) {
    constexpr int kActs = decltype(rows)::value;
    for (int m = 0; m < kActs; ++m) {
      arrange_plain<kActs>(a + m * weight.width, weight.width, m, acts);
    }
    dot_weight_plain<kActs>(weight, acts, threads, store);
  });
}

#ifdef BNB_AVX512BF16
template <class Store>
void multiply_few(const Weight4& weight, const bnb::BFloat16* a, int64_t count, int threads, const Store& store) {
  if (weight.grouped_order && count >= 4 && ScaledBFloat16Dot::takes(weight)) {
    dot_arranged<ScaledBFloat16Dot>(weight, a, count, threads, store);
  } else if (weight.grouped_order) {
    dot_arranged<BFloat16Dot>(weight, a, count, threads, store);
  } else {
    multiply_few<bnb::BFloat16, Store>(weight, a, count, threads, store);
  }
}
#endif

}  // namespace BNB_ISA
}  // namespace bnb_cpu
