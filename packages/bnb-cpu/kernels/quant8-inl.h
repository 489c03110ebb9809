// 8-bit block-wise quantization and dequantization with a codebook of up to 256 values.
#pragma once

#include "codebook-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

void quantize_blockwise(const void* x, int dtype, int64_t count, int64_t blocksize, const float* code,
                        int64_t code_size, uint8_t* codes, float* absmax, int threads) {
  Codebook codebook;
  codebook.prepare_codes(code, code_size);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel(threads, ceil_divide(count, blocksize), grain_of(blocksize), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * blocksize, left = count - first;
        const int64_t size = left < blocksize ? left : blocksize;
        const T* from = static_cast<const T*>(x) + first;
        const uint32_t largest = absmax_bits<false>(from, size);
        const bool finite = largest < 0x7f800000u;
        const uint32_t most = finite ? largest : absmax_bits<true>(from, size);
        absmax[block] = bnb::float_of(most);
        if (most == 0) {
          // Part of the format: code 0, whatever its value, and not the code nearest to zero.
          memset(codes + first, 0, static_cast<size_t>(size));
        } else {
          codebook.quantize(from, 1.0f / bnb::float_of(most), finite, size, codes + first);
        }
      }
    });
  });
}

// --- dequantize --------------------------------------------------------------------------------------

template <bool kStream, class T>
void decode_blocks_8bit(const uint8_t* codes, const float* absmax, const float* values, int64_t begin, int64_t end,
                        int64_t count, int64_t blocksize, T* out) {
  const Table256 table(values);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * blocksize, left = count - first;
    const int64_t stop = first + (left < blocksize ? left : blocksize);
    const F32 scale = splat(absmax[block]);
    int64_t i = first;
    for (; i + kLanes <= stop; i += kLanes) {
      put<kStream>(out + i, lookup(table, codes + i) * scale);
    }
    for (; i < stop; ++i) {
      bnb::from_float(values[codes[i]] * absmax[block], out[i]);
    }
  }
  if (kStream) {
    stream_fence();
  }
}

void dequantize_blockwise(const uint8_t* codes, const float* absmax, const float* code, int64_t code_size,
                          int64_t count, int64_t blocksize, void* out, int dtype, int threads) {
  float values[256];
  for (int64_t i = 0; i < 256; ++i) {
    values[i] = code[i < code_size ? i : code_size - 1];
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = static_cast<T*>(out);
    const bool streaming = should_stream(to, count, blocksize);
    parallel(threads, ceil_divide(count, blocksize), grain_of(blocksize), [&](int64_t begin, int64_t end) {
      if (streaming) {
        decode_blocks_8bit<true>(codes, absmax, values, begin, end, count, blocksize, to);
      } else {
        decode_blocks_8bit<false>(codes, absmax, values, begin, end, count, blocksize, to);
      }
    });
  });
}

constexpr void fill_quant8(Kernels& kernels) {
  kernels.quantize_blockwise = quantize_blockwise;
  kernels.dequantize_blockwise = dequantize_blockwise;
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
