// Few int8 rows times an int8 weight: inner products along the rows of the weight, exact modulo 2^32.
#pragma once

#include "gemm-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Each kind says how many rows of activations share the registers (kActs), and up to how many are multiplied here
// (kRows): each kActs of them read the weight again, which costs less than the panels of int8_gemm-inl.h.
#if defined(BNB_AVX512VNNI)
// The dot product takes unsigned by signed bytes: weights get 128 added (the sign bit flipped), and 128
// times the sum of the activations is subtracted at the end.
struct Int8Dot {
  using Word = int8_t;
  static constexpr int kStep = 64;
  static constexpr int kActs = 8;
  static constexpr int kRows = 8;

  static int32_t correction(const int8_t* from, int64_t width) {
    int32_t sum = 0;
    for (int64_t k = 0; k < width; ++k) {
      sum += from[k];
    }
    return static_cast<int32_t>(static_cast<uint32_t>(sum) * 128u);
  }

  static __m512i weights(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static __m512i weights(const int8_t* p, int64_t count) {
    const __mmask64 mask = (uint64_t{1} << count) - 1;
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static __m512i acts(const Word* p) { return _mm512_loadu_si512(p); }
  static I32 step(I32 sum, __m512i weights, __m512i acts) { return {_mm512_dpbusd_epi32(sum.v, weights, acts)}; }
};
#elif defined(__AVX2__) || defined(BNB_NEON)
struct Int8Dot {
#if defined(BNB_NEON)
  using Word = int8_t;
  using Words = int8x16_t;
  static constexpr int kStep = 16;
  static constexpr int kActs = 8;
  static constexpr int kRows = 8;
  static Words weights(const int8_t* p) { return vld1q_s8(p); }
  static Words acts(const Word* p) { return vld1q_s8(p); }
  static I32 step(I32 sum, Words weights, Words acts) {
#if defined(BNB_NEON_DOT)
    return {vdotq_s32(sum.v, weights, acts)};
#else
    const int32x4_t half = vpadalq_s16(sum.v, vmull_s8(vget_low_s8(weights), vget_low_s8(acts)));
    return {vpadalq_s16(half, vmull_high_s8(weights, acts))};
#endif
  }
#else
  // Both sides as int16, whose products are added in pairs without overflow.
  using Word = int16_t;
  static constexpr int kStep = 2 * kLanes;
  static constexpr int kActs = kLanes == 16 ? 8 : 4;
  static constexpr int kRows = kLanes == 16 ? 8 : 12;
#if defined(__AVX512F__)
  using Words = __m512i;
  static Words weights(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Words acts(const Word* p) { return _mm512_loadu_si512(p); }
  static I32 step(I32 sum, Words weights, Words acts) {
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(weights, acts))};
  }
#else
  using Words = __m256i;
  static Words weights(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Words acts(const Word* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I32 step(I32 sum, Words weights, Words acts) {
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(weights, acts))};
  }
#endif
#endif
  static Words weights(const int8_t* p, int64_t count) {
    int8_t bytes[kStep] = {};
    memcpy(bytes, p, static_cast<size_t>(count));
    return weights(bytes);
  }
  static int32_t correction(const int8_t*, int64_t) { return 0; }
};
#else
// Loops that compilers turn into the widening multiplications of the instruction set.
struct Int8Dot {
  using Word = int8_t;
  static constexpr int kStep = 1;
  static constexpr int kActs = 4;
  static constexpr int kRows = 4;

  static int32_t correction(const int8_t*, int64_t) { return 0; }
};
#endif

// Row m of `acts` rows of activations as they are used: step 0 of all rows, then step 1, and so on, with zeros behind
// the last element.
BNB_FN void arrange_int8(const int8_t* from, int64_t width, int64_t m, int64_t acts, Int8Dot::Word* out) {
  constexpr int kStep = Int8Dot::kStep;
  for (int64_t k = 0; k < width; k += kStep) {
    Int8Dot::Word* const to = out + k * acts + m * kStep;
    const int64_t count = min_of(kStep, width - k);
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[k + i];
    }
    for (int64_t i = count; i < kStep; ++i) {
      to[i] = 0;
    }
  }
}

// Rows of the weight that go through one stretch of the activations together.
constexpr int64_t kInt8Block = 16;

#if defined(__AVX2__) || defined(BNB_NEON)
// Vectors of sums, which are added up across lanes at the end.
using Int8Total = I32;

// Adds the products over elements [k, k + count) of kWeights weight rows to totals[m * kInt8Block + r].
template <int kWeights, int kActs>
void dot_int8(const int8_t* weight, int64_t width, int64_t k, int64_t count, const Int8Dot::Word* acts,
              Int8Total* totals) {
  I32 sums[kWeights][kActs];
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      sums[r][m] = totals[m * kInt8Block + r];
    }
  }
  const int64_t ahead = prefetch_distance(kWeights * width);
  const auto add = [&](int64_t at, const auto&... left) {
    decltype(Int8Dot::weights(weight)) words[kWeights];
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r) {
      words[r] = Int8Dot::weights(weight + r * width + at, left...);
      prefetch(weight + r * width + at, ahead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      const auto act = Int8Dot::acts(acts + at * kActs + m * Int8Dot::kStep);
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) {
        sums[r][m] = Int8Dot::step(sums[r][m], words[r], act);
      }
    }
  };
  const int64_t whole = k + count / Int8Dot::kStep * Int8Dot::kStep;
  for (int64_t at = k; at < whole; at += Int8Dot::kStep) {
    add(at);
  }
  if (whole < k + count) {
    add(whole, k + count - whole);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kActs; ++m) {
      totals[m * kInt8Block + r] = sums[r][m];
    }
  }
}

BNB_FN void add_up(const Int8Total* totals, int64_t count, int32_t* sums) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(sums + i, sums_of_lanes(totals + i));
  }
}
#else
using Int8Total = uint32_t;

template <int kWeights, int kActs>
void dot_int8(const int8_t* weight, int64_t width, int64_t k, int64_t count, const int8_t* acts, Int8Total* totals) {
  for (int r = 0; r < kWeights; ++r) {
    for (int m = 0; m < kActs; ++m) {
      uint32_t sum = 0;
      for (int64_t at = k; at < k + count; ++at) {
        sum += static_cast<uint32_t>(static_cast<int32_t>(weight[r * width + at]) * acts[at * kActs + m]);
      }
      totals[m * kInt8Block + r] += sum;
    }
  }
}

BNB_FN void add_up(const Int8Total* totals, int64_t count, int32_t* sums) {
  memcpy(sums, totals, static_cast<size_t>(count) * sizeof(int32_t));
}
#endif

// dot_int8 for `rows` weight rows, up to kInt8Block.
template <int kActs>
void dot_int8_block(const int8_t* weight, int64_t rows, int64_t width, int64_t k, int64_t count,
                    const Int8Dot::Word* acts, Int8Total* totals) {
  // AVX-512 and AArch64 have 32 registers.
  constexpr int kWeights = kActs <= 4 && (kLanes == 16 || kLanes == 4) ? 4 : 2;
  int64_t r = 0;
  for (; r + kWeights <= rows; r += kWeights) {
    dot_int8<kWeights, kActs>(weight + r * width, width, k, count, acts, totals + r);
  }
  for (; r < rows; ++r) {
    dot_int8<1, kActs>(weight + r * width, width, k, count, acts, totals + r);
  }
}

// Up to Int8Dot::kRows rows of `a`, in groups of Int8Dot::kActs. store(row, count, m, sums) takes the products of
// `count` rows of `b`, up to kInt8Block, with row m of `a`.
template <class Store>
void multiply_int8_few(const int8_t* a, int64_t a_rows, const int8_t* b, int64_t rows, int64_t width, int threads,
                       const Store& store) {
  using Word = Int8Dot::Word;
  constexpr int64_t kActs = Int8Dot::kActs;
  // A stretch of the activations takes at most half of a first-level cache of 32 KiB. With more than one group this
  // also leaves room for the block of weights, which each group reads again.
  const int64_t stretch = 16384 / (a_rows * static_cast<int64_t>(sizeof(Word))) / Int8Dot::kStep * Int8Dot::kStep;
  const int64_t padded = round_up(width, Int8Dot::kStep);
  Scratch scratch(Scratch::bytes_for<Word>(a_rows * padded));
  Word* const acts = scratch.take<Word>(a_rows * padded);
  uint32_t corrections[Int8Dot::kRows];
  for (int64_t m = 0; m < a_rows; ++m) {
    const int64_t first = m / kActs * kActs;
    arrange_int8(a + m * width, width, m - first, min_of(kActs, a_rows - first), acts + first * padded);
    corrections[m] = static_cast<uint32_t>(Int8Dot::correction(a + m * width, width));
  }
  const int64_t units = ceil_divide(rows, kInt8Block), parts = parts_of(threads, units, rows * width * a_rows);
  parallel_parts(parts, units, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kInt8Block, count = min_of(kInt8Block, rows - first);
      Int8Total totals[kInt8Block * Int8Dot::kRows];
      memset(static_cast<void*>(totals), 0, static_cast<size_t>(kInt8Block * a_rows) * sizeof *totals);
      for (int64_t k = 0; k < width; k += stretch) {
        for (int64_t m = 0; m < a_rows; m += kActs) {
          with_count<kActs>(min_of(kActs, a_rows - m), [&](auto group) {
            dot_int8_block<decltype(group)::value>(b + first * width, count, width, k, min_of(stretch, width - k),
                                                   acts + m * padded, totals + m * kInt8Block);
          });
        }
      }
      int32_t sums[Int8Dot::kRows][kInt8Block];
      add_up(totals, kInt8Block * a_rows, sums[0]);
      for (int64_t m = 0; m < a_rows; ++m) {
        for (int64_t r = 0; r < count; ++r) {
          sums[m][r] = static_cast<int32_t>(static_cast<uint32_t>(sums[m][r]) - corrections[m]);
        }
        store(first, count, m, sums[m]);
      }
    }
  });
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
