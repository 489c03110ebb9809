// Rows of a 4-bit table, gathered and dequantized in one pass.
#pragma once

#include "quant4-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Decodes elements [begin, end), which may start inside a block and inside a byte.
template <class T, class Absmax>
BNB_FN void decode_range_4bit(const uint8_t* packed, const Absmax& absmax, int64_t begin, int64_t end,
                              int64_t blocksize, const Table16& table, const float* values, T* out) {
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / blocksize, next = (block + 1) * blocksize;
    const int64_t stop = next < end ? next : end;
    const float scale = absmax(block);
    if (i & 1) {
      bnb::from_float(values[bnb::nibble_at(packed, i)] * scale, out[i - begin]);
      ++i;
    }
    decode_4bit<false>(packed, i, stop - i, table, values, scale, out + (i - begin));
    i = stop;
  }
}

template <class Index>
BNB_FN int64_t find_outside(const Index* indices, int64_t count, int64_t table_rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= table_rows) {
      return i;
    }
  }
  return -1;
}

template <class Index, class Absmax>
int64_t gather_rows_4bit(const Index* indices, int64_t count, const uint8_t* packed, int64_t table_rows, int64_t width,
                         const Absmax& absmax, int64_t blocksize, int quant_type, void* out, int dtype, int threads) {
  const int64_t outside = find_outside(indices, count, table_rows);
  if (outside >= 0) {
    return outside;
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = static_cast<T*>(out);
    const float* values = tables_4bit(quant_type).values;
    parallel(threads, count, grain_of(width > 0 ? width : 1), [&](int64_t begin, int64_t end) {
      const Table16 table(values);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = static_cast<int64_t>(indices[i]) * width;
        decode_range_4bit(packed, absmax, first, first + width, blocksize, table, values, to + i * width);
      }
    });
  });
  return -1;
}

int64_t embedding_4bit(const void* indices, int index_bytes, int64_t count, const uint8_t* packed, int64_t table_rows,
                       int64_t width, const float* absmax, const uint8_t* absmax_8bit, const float* code,
                       int64_t code_size, const float* offset, int64_t blocksize, int64_t nested_blocksize,
                       int quant_type, void* out, int dtype, int threads) {
  const auto gather = [&](const auto& statistics) {
    if (index_bytes == 4) {
      return gather_rows_4bit(static_cast<const int32_t*>(indices), count, packed, table_rows, width, statistics,
                              blocksize, quant_type, out, dtype, threads);
    }
    return gather_rows_4bit(static_cast<const int64_t*>(indices), count, packed, table_rows, width, statistics,
                            blocksize, quant_type, out, dtype, threads);
  };
  if (absmax_8bit == nullptr) {
    return gather(PlainAbsmax{absmax});
  }
  return gather(NestedAbsmax{absmax, absmax_8bit, code, code_size, *offset, nested_blocksize});
}

constexpr void fill_embedding4(Kernels& kernels) { kernels.embedding_4bit = embedding_4bit; }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
