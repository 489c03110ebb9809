// 4-bit quantization and dequantization of the flattened tensor, block by block.
#pragma once

#include "simd-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Tables of a 4-bit type. The search narrows the rank down in steps of 8, 4, 2 and 1; in the table of step
// s, entry r is midpoint r + s - 1, the boundary to look at when the rank is known to be r or more.
struct Tables4 {
  float values[16];
  float midpoints[16];
  float step4[16];
  float step2[16];
  int32_t order[16];

  constexpr Tables4(const float (&table)[16], const float (&bounds)[15], const int32_t (&ranks)[16])
      : values{}, midpoints{}, step4{}, step2{}, order{} {
    for (int i = 0; i < 16; ++i) {
      values[i] = table[i];
      order[i] = ranks[i];
      midpoints[i] = bounds[i < 15 ? i : 14];
      step2[i] = bounds[i + 1 < 15 ? i + 1 : 14];
      step4[i] = bounds[i + 3 < 15 ? i + 3 : 14];
    }
  }
};

constexpr Tables4 kNf4{{BNB_NF4_VALUES}, {BNB_NF4_MIDPOINTS}, {BNB_NF4_ORDER}};
constexpr Tables4 kFp4{{BNB_FP4_VALUES}, {BNB_FP4_MIDPOINTS}, {BNB_FP4_ORDER}};

BNB_FN const Tables4& tables_4bit(int quant_type) {
  return static_cast<bnb::QuantType>(quant_type) == bnb::QuantType::kFp4 ? kFp4 : kNf4;
}

// --- quantize ----------------------------------------------------------------------------------------

// Finds the code of a scaled value without a branch.
class Search4 {
 public:
  explicit Search4(const Tables4& tables)
      : tables_(tables),
        middle_(splat(tables.midpoints[7])),
        step4_(tables.step4),
        step2_(tables.step2),
        step1_(tables.midpoints),
        order_(tables.order) {}

  I32 operator()(F32 scaled) const {
    // A comparison with NaN is false, so that NaN moves up at each step.
    I32 rank = select(scaled <= middle_, splat(0), splat(8));
    rank = rank + select(scaled <= lookup(step4_, rank), splat(0), splat(4));
    rank = rank + select(scaled <= lookup(step2_, rank), splat(0), splat(2));
    rank = rank + select(scaled <= lookup(step1_, rank), splat(0), splat(1));
    return bits_of(lookup(order_, rank));
  }

  unsigned operator()(float scaled) const {
    return static_cast<unsigned>(tables_.order[bnb::rank_4bit(scaled, tables_.midpoints)]);
  }

 private:
  const Tables4& tables_;
  F32 middle_;
  Table16 step4_, step2_, step1_, order_;
};

// The same for NF4 values of [-1, 1], not NaN, in half as many steps where 32 entries fit two registers.
// Of 32 equal cells none holds two midpoints: the cell of a value tells its rank but for one comparison.
// Midpoints keep away from the edges of cells, so that it does not matter how the cell's number is rounded.
#ifdef __AVX512F__
constexpr float kCellScale = 15.91f;

struct CellTables {
  float bounds[32];
  int32_t ranks[32];
  bool fit = true;

  constexpr explicit CellTables(const Tables4& tables) : bounds{}, ranks{} {
    for (int cell = 0; cell < 32; ++cell) {
      bounds[cell] = 2.0f;
      ranks[cell] = 0;
    }
    int before = -1;
    for (int i = 0; i < 15; ++i) {
      const float position = (tables.midpoints[i] + 1.0f) * kCellScale;
      const int cell = static_cast<int>(position);
      const float inside = position - static_cast<float>(cell);
      fit = fit && cell > before && inside > 0.05f && inside < 0.95f && tables.order[i] == i;
      before = cell;
      bounds[cell] = tables.midpoints[i];
      for (int later = cell + 1; later < 32; ++later) {
        ranks[later] = i + 1;
      }
    }
  }
};

constexpr CellTables kNf4Cells{kNf4};
static_assert(kNf4Cells.fit, "choose another kCellScale");

class CellSearchNf4 {
 public:
  explicit CellSearchNf4(const Search4& search)
      : search_(search),
        bounds_{_mm512_loadu_ps(kNf4Cells.bounds), _mm512_loadu_ps(kNf4Cells.bounds + 16)},
        ranks_{_mm512_loadu_si512(kNf4Cells.ranks), _mm512_loadu_si512(kNf4Cells.ranks + 16)} {}

  I32 operator()(F32 scaled) const {
    const __m512i cell = _mm512_cvttps_epi32(fma(scaled, splat(kCellScale), splat(kCellScale)).v);
    const __m512i rank = _mm512_permutex2var_epi32(ranks_[0], cell, ranks_[1]);
    const __mmask16 above =
        _mm512_cmp_ps_mask(scaled.v, _mm512_permutex2var_ps(bounds_[0], cell, bounds_[1]), _CMP_GT_OQ);
    return {_mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1))};
  }

  unsigned operator()(float scaled) const { return search_(scaled); }

 private:
  const Search4& search_;
  __m512 bounds_[2];
  __m512i ranks_[2];
};
#endif

struct Multiply {
  float factor;
  F32 operator()(F32 a) const { return a * splat(factor); }
  float operator()(float a) const { return a * factor; }
};

struct Divide {
  float divisor;
  F32 operator()(F32 a) const { return a / splat(divisor); }
  float operator()(float a) const { return a / divisor; }
};

template <class T, class Search, class Scale>
BNB_FN void encode_block_4bit(const T* x, int64_t count, const Search& search, Scale scale, uint8_t* packed) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_nibbles(packed, i, search(scale(load(x + i))));
  }
  const auto code_at = [&](int64_t at) { return search(scale(bnb::to_float(x[at]))); };
  for (; i + 1 < count; i += 2) {
    packed[i >> 1] = bnb::pack_nibbles(code_at(i), code_at(i + 1));
  }
  if (count & 1) {
    packed[count >> 1] = bnb::pack_nibbles(code_at(count - 1), search(0.0f));
  }
}

// Encodes the blocks [begin, end). `finite` may be any search that does without NaN and infinity.
template <class T, class Finite>
void encode_blocks_4bit(const T* x, int64_t begin, int64_t end, int64_t count, int64_t blocksize, const Search4& search,
                        const Finite& finite, uint8_t* packed, float* absmax) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * blocksize, left = count - first;
    const T* from = x + first;
    uint8_t* to = packed + first / 2;
    const bool partial = left < blocksize;
    const uint32_t bits = absmax_bits<false>(from, partial ? left : blocksize);
    const float most = bnb::float_of(bits), clamped = bnb::clamp_absmax_4bit(most);
    // Part of the format: a partial block is divided and its absmax stored clamped.
    absmax[block] = partial ? clamped : most;
    if (partial) {
      encode_block_4bit(from, left, search, Divide{clamped}, to);
    } else if (bits < 0x7f800000u) {
      encode_block_4bit(from, blocksize, finite, Multiply{1.0f / clamped}, to);
    } else {
      encode_block_4bit(from, blocksize, search, Multiply{1.0f / clamped}, to);
    }
  }
}

void quantize_4bit(const void* x, int dtype, int64_t count, int64_t blocksize, int quant_type, uint8_t* packed,
                   float* absmax, int threads) {
  with_dtype(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(x);
    parallel(threads, ceil_divide(count, blocksize), grain_of(blocksize), [=](int64_t begin, int64_t end) {
      const Search4 search(tables_4bit(quant_type));
#ifdef __AVX512F__
      if (static_cast<bnb::QuantType>(quant_type) == bnb::QuantType::kNf4) {
        const CellSearchNf4 cells(search);
        return encode_blocks_4bit(from, begin, end, count, blocksize, search, cells, packed, absmax);
      }
#endif
      encode_blocks_4bit(from, begin, end, count, blocksize, search, search, packed, absmax);
    });
  });
}

// --- dequantize --------------------------------------------------------------------------------------

struct PlainAbsmax {
  const float* absmax;
  float operator()(int64_t block) const { return absmax[block]; }
};

struct NestedAbsmax {
  const float* absmax;
  const uint8_t* absmax_8bit;
  const float* code;
  int64_t code_size;
  float offset;
  int64_t nested_blocksize;

  float operator()(int64_t block) const {
    const int64_t index = absmax_8bit[block];
    return bnb::nested_absmax(code[index < code_size ? index : code_size - 1], absmax[block / nested_blocksize],
                              offset);
  }
};

// Decodes `count` elements from element `first` of `packed` on; `first` is even.
template <bool kStream, class T>
BNB_FN void decode_4bit(const uint8_t* packed, int64_t first, int64_t count, const Table16& table, const float* values,
                        float absmax, T* out) {
  const uint8_t* from = packed + first / 2;
  const F32 scale = splat(absmax);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    put<kStream>(out + i, lookup(table, load_nibbles(from, i)) * scale);
  }
  for (; i < count; ++i) {
    bnb::from_float(values[bnb::nibble_at(from, i)] * absmax, out[i]);
  }
}

template <bool kStream, class T, class Absmax>
void decode_blocks_4bit(const uint8_t* packed, const Absmax& absmax, int64_t begin, int64_t end, int64_t count,
                        int64_t blocksize, const Tables4& tables, T* out) {
  const Table16 table(tables.values);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * blocksize, left = count - first;
    decode_4bit<kStream>(packed, first, left < blocksize ? left : blocksize, table, tables.values, absmax(block),
                         out + first);
  }
  if (kStream) {
    stream_fence();
  }
}

template <class Absmax>
void dequantize_4bit_with(const uint8_t* packed, const Absmax& absmax, int64_t count, int64_t blocksize, int quant_type,
                          void* out, int dtype, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = static_cast<T*>(out);
    const Tables4& tables = tables_4bit(quant_type);
    const bool streaming = should_stream(to, count, blocksize);
    parallel(threads, ceil_divide(count, blocksize), grain_of(blocksize), [&](int64_t begin, int64_t end) {
      if (streaming) {
        decode_blocks_4bit<true>(packed, absmax, begin, end, count, blocksize, tables, to);
      } else {
        decode_blocks_4bit<false>(packed, absmax, begin, end, count, blocksize, tables, to);
      }
    });
  });
}

void dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t count, int64_t blocksize, int quant_type,
                     void* out, int dtype, int threads) {
  dequantize_4bit_with(packed, PlainAbsmax{absmax}, count, blocksize, quant_type, out, dtype, threads);
}

void dequantize_4bit_nested(const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit, const float* code,
                            int64_t code_size, const float* offset, int64_t count, int64_t blocksize,
                            int64_t nested_blocksize, int quant_type, void* out, int dtype, int threads) {
  const NestedAbsmax nested{absmax, absmax_8bit, code, code_size, *offset, nested_blocksize};
  dequantize_4bit_with(packed, nested, count, blocksize, quant_type, out, dtype, threads);
}

constexpr void fill_quant4(Kernels& kernels) {
  kernels.quantize_4bit = quantize_4bit;
  kernels.dequantize_4bit = dequantize_4bit;
  kernels.dequantize_4bit_nested = dequantize_4bit_nested;
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
