// 8-bit block-wise quantization and dequantization with a codebook of up to 256 values.
#pragma once

#include "simd-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

// The first grid position whose point is above a boundary, at least `position`: that of a boundary that is not
// higher.
BNB_FN int first_position_above(float boundary, int position) {
  // The points are sorted: start near the boundary and walk to the first point above it.
  int next = boundary >= 1.0f ? bnb::kGridPoints : boundary > -1.0f ? bnb::grid_position(boundary) : 0;
  next = next < position ? position : next;
  while (next > position && !(bnb::grid_value(next - 1) <= boundary)) {
    --next;
  }
  while (next < bnb::kGridPoints && bnb::grid_value(next) <= boundary) {
    ++next;
  }
  return next;
}

// For each point of the grid, the code nearest to it: as many codes as have a boundary below the point.
BNB_FN void fill_grid_codes(const float* code, int64_t code_size, uint8_t* grid_codes) {
  int position = 0;
  for (int64_t i = 0; i + 1 < code_size; ++i) {
    const int next = first_position_above(bnb::midpoint_8bit(code[i], code[i + 1]), position);
    memset(grid_codes + position, static_cast<int>(i), static_cast<size_t>(next - position));
    position = next;
  }
  memset(grid_codes + position, static_cast<int>(code_size - 1), static_cast<size_t>(bnb::kGridPoints - position));
}

// The position after the grid stands for NaN, which gets code 0.
constexpr int kNanPosition = bnb::kGridPoints;

BNB_FN I32 position_or_nan(F32 scaled) {
  const F32 clamped = min(max(scaled, splat(-1.0f)), splat(1.0f));
  const I32 position = truncate((clamped + splat(1.0f)) * splat(bnb::kGridScale) + splat(0.5f));
  return select(scaled <= splat(bnb::float_of(0x7f800000u)), position, splat(kNanPosition));
}

BNB_FN int position_or_nan(float scaled) { return bnb::is_nan(scaled) ? kNanPosition : bnb::grid_position(scaled); }

template <class T>
void encode_block_8bit(const T* x, int64_t count, float scale, const uint8_t* grid_codes, uint8_t* codes) {
  // Positions are computed in vectors and looked up one by one: the table is too large for registers, and
  // gathers of single bytes are slower than loads.
  constexpr int kChunk = 256;
  int32_t positions[kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int size = static_cast<int>(count - start < kChunk ? count - start : kChunk);
    const int whole = size / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      store(positions + i, position_or_nan(load(x + start + i) * splat(scale)));
    }
    for (int i = whole; i < size; ++i) {
      positions[i] = position_or_nan(bnb::to_float(x[start + i]) * scale);
    }
    for (int j = 0; j < size; ++j) {
      codes[start + j] = grid_codes[positions[j]];
    }
  }
}

void quantize_blockwise(const void* x, int dtype, int64_t count, int64_t blocksize, const float* code,
                        int64_t code_size, uint8_t* codes, float* absmax, int threads) {
  uint8_t grid_codes[bnb::kGridPoints + 1];
  fill_grid_codes(code, code_size, grid_codes);
  grid_codes[kNanPosition] = 0;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel(threads, ceil_divide(count, blocksize), grain_of(blocksize), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * blocksize, left = count - first;
        const int64_t size = left < blocksize ? left : blocksize;
        const T* from = static_cast<const T*>(x) + first;
        const uint32_t most = absmax_bits<true>(from, size);
        absmax[block] = bnb::float_of(most);
        if (most == 0) {
          // Part of the format: code 0, whatever its value, and not the code nearest to zero.
          memset(codes + first, 0, static_cast<size_t>(size));
        } else {
          encode_block_8bit(from, size, 1.0f / bnb::float_of(most), grid_codes, codes + first);
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
      put<kStream>(out + i, lookup(table, load_bytes(codes + i)) * scale);
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
