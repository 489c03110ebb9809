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

template <class T, class Scale>
void encode_block_4bit(const T* x, int64_t count, const Search4& search, Scale scale, uint8_t* packed) {
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

void quantize_4bit(const void* x, int dtype, int64_t count, int64_t blocksize, int quant_type, uint8_t* packed,
                   float* absmax, int threads) {
  with_dtype(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    parallel(threads, ceil_divide(count, blocksize), grain_of(blocksize), [=](int64_t begin, int64_t end) {
      const Search4 search(tables_4bit(quant_type));
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * blocksize, left = count - first;
        const T* from = static_cast<const T*>(x) + first;
        uint8_t* to = packed + first / 2;
        const bool partial = left < blocksize;
        const float most = bnb::float_of(absmax_bits<false>(from, partial ? left : blocksize));
        const float clamped = bnb::clamp_absmax_4bit(most);
        // Part of the format: a partial block is divided and its absmax stored clamped.
        if (partial) {
          absmax[block] = clamped;
          encode_block_4bit(from, left, search, Divide{clamped}, to);
        } else {
          absmax[block] = most;
          encode_block_4bit(from, blocksize, search, Multiply{1.0f / clamped}, to);
        }
      }
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
BNB_FN void decode_4bit(const uint8_t* packed, int64_t first, int64_t count, const Table16& table,
                        const float* values, float absmax, T* out) {
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
void dequantize_4bit_with(const uint8_t* packed, const Absmax& absmax, int64_t count, int64_t blocksize,
                          int quant_type, void* out, int dtype, int threads) {
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
