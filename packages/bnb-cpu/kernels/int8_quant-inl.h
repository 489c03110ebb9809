// Row-wise and column-wise int8 quantization of LLM.int8(), with and without outliers.
#pragma once

#include "gemm-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

constexpr uint32_t kInfinityBits = 0x7f800000u;

// How a row or column with a given absmax is scaled.
struct Int8Scale {
  float factor;   // 127 / absmax, as reciprocal times 127
  float divisor;  // where the factor overflows: absmax to divide by first; else 1
  bool zero;      // all codes are 0: the absmax is zero, infinite or NaN
};

BNB_FN Int8Scale int8_scale(uint32_t absmax_bits) {
  if (absmax_bits == 0 || absmax_bits >= kInfinityBits) {
    return {0.0f, 1.0f, true};
  }
  const float absmax = bnb::float_of(absmax_bits), factor = (1.0f / absmax) * 127.0f;
  if (bnb::bits_of(factor) == kInfinityBits) {
    return {127.0f, absmax, false};
  }
  return {factor, 1.0f, false};
}

// Nearest integer, ties to even, of a value whose magnitude is at most 127 or so: adding 1.5 * 2^23 leaves
// no bits for a fraction.
BNB_FN int8_t int8_code(float value, const Int8Scale& scale) {
  const float scaled = value / scale.divisor * scale.factor;
  constexpr float kMagic = 12582912.0f;
  return static_cast<int8_t>(bnb::bits_of(scaled + kMagic) - bnb::bits_of(kMagic));
}

template <class T>
BNB_FN void encode_int8_row(const T* x, int64_t width, const Int8Scale& scale, int8_t* codes) {
  if (scale.zero) {
    memset(codes, 0, static_cast<size_t>(width));
    return;
  }
  const F32 factor = splat(scale.factor);
  int64_t i = 0;
  if (scale.divisor == 1.0f) {
    for (; i + kLanes <= width; i += kLanes) {
      store_bytes(reinterpret_cast<uint8_t*>(codes + i), round_to_int(load(x + i) * factor));
    }
  }
  for (; i < width; ++i) {
    codes[i] = int8_code(bnb::to_float(x[i]), scale);
  }
}

// --- outliers --------------------------------------------------------------------------------------------

// A threshold in the dtype of the values that it is compared with.
template <class T>
float threshold_in(float threshold) {
  T rounded;
  bnb::from_float(threshold, rounded);
  return bnb::to_float(rounded);
}

BNB_FN bool is_outlier(float value, float threshold) { return bnb::magnitude(value) >= threshold; }

// Largest magnitude below the threshold as bits (NaN wins); flags[k] is set where there is an outlier.
template <class T>
BNB_FN uint32_t absmax_without_outliers(const T* x, int64_t width, float threshold, uint8_t* flags) {
  const I32 magnitude_mask = splat(0x7fffffff);
  const F32 limit = splat(threshold);
  I32 most = splat(0);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const I32 bits = bits_of(load(x + i)) & magnitude_mask;
    const Mask outliers = limit <= float_of(bits);
    most = max(most, select(outliers, splat(0), bits));
    if (any(outliers)) {
      for (int lane = 0; lane < kLanes; ++lane) {
        flags[i + lane] |= is_outlier(bnb::to_float(x[i + lane]), threshold);
      }
    }
  }
  uint32_t bits = static_cast<uint32_t>(reduce_max(most));
  for (; i < width; ++i) {
    const float value = bnb::to_float(x[i]);
    if (is_outlier(value, threshold)) {
      flags[i] = 1;
    } else if (bnb::magnitude_bits(value) > bits) {
      bits = bnb::magnitude_bits(value);
    }
  }
  return bits;
}

// Ascending indices of set flags; returns their number.
BNB_FN int64_t flagged(const uint8_t* flags, int64_t width, int64_t* columns) {
  int64_t count = 0;
  for (int64_t k = 0; k < width; ++k) {
    // Hardly any is set: eight at a time are passed over.
    uint64_t eight = 1;
    if (k + 8 <= width) {
      memcpy(&eight, flags + k, sizeof eight);
    }
    if (eight == 0) {
      k += 7;
    } else if (flags[k]) {
      columns[count++] = k;
    }
  }
  return count;
}

// --- rows ------------------------------------------------------------------------------------------------

// Codes of row r go to codes + r * stride. Returns the number of outlier columns.
template <class T>
int64_t quantize_int8_rows(const T* x, int64_t rows, int64_t width, float threshold, int8_t* codes, int64_t stride,
                           float* absmax, int64_t* outlier_columns, int threads) {
  const int64_t grain = grain_of(max_of(width, 1));
  if (!(threshold > 0.0f)) {
    parallel(threads, rows, grain, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = x + row * width;
        const uint32_t most = absmax_bits<false>(from, width);
        absmax[row] = bnb::float_of(most);
        encode_int8_row(from, width, int8_scale(most), codes + row * stride);
      }
    });
    return 0;
  }
  // Each thread has flags of its own, since two may find the same column.
  const int64_t parts = max_of(1, min_of(threads, rows / grain));
  const float limit = threshold_in<T>(threshold);
  Scratch scratch(parts * Scratch::bytes_for<uint8_t>(width));
  uint8_t* const all_flags = scratch.take<uint8_t>(parts * width);
  memset(all_flags, 0, static_cast<size_t>(parts * width));
  parallel_parts(parts, rows, [=](int64_t part, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + row * width;
      const uint32_t most = absmax_without_outliers(from, width, limit, all_flags + part * width);
      absmax[row] = bnb::float_of(most);
      // What stands in place of an outlier does not matter: its column is cleared below.
      encode_int8_row(from, width, int8_scale(most), codes + row * stride);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t k = 0; k < width; ++k) {
      all_flags[k] |= all_flags[part * width + k];
    }
  }
  const int64_t count = flagged(all_flags, width, outlier_columns);
  parallel(threads, rows, grain_of(max_of(count, 1)), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < count; ++i) {
        codes[row * stride + outlier_columns[i]] = 0;
      }
    }
  });
  return count;
}

int64_t int8_vectorwise_quant(const void* x, int dtype, int64_t rows, int64_t width, float threshold, int8_t* codes,
                              float* absmax, int64_t* outlier_columns, int threads) {
  int64_t count = 0;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    count = quantize_int8_rows(static_cast<const T*>(x), rows, width, threshold, codes, width, absmax, outlier_columns,
                               threads);
  });
  return count;
}

// --- columns ---------------------------------------------------------------------------------------------

// Columns that are handled together: whole cache lines of every dtype.
constexpr int64_t kColumnBlock = 64;

template <class T>
BNB_FN void quantize_int8_columns(const T* x, int64_t rows, int64_t width, int64_t columns, float limit, int8_t* codes,
                                  float* absmax) {
  uint32_t most[kColumnBlock] = {};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < columns; ++k) {
      const float value = bnb::to_float(x[row * width + k]);
      const uint32_t bits = is_outlier(value, limit) ? 0u : bnb::magnitude_bits(value);
      most[k] = bits > most[k] ? bits : most[k];
    }
  }
  Int8Scale scales[kColumnBlock];
  for (int64_t k = 0; k < columns; ++k) {
    absmax[k] = bnb::float_of(most[k]);
    scales[k] = int8_scale(most[k]);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < columns; ++k) {
      const float value = bnb::to_float(x[row * width + k]);
      const bool zero = scales[k].zero || is_outlier(value, limit);
      codes[row * width + k] = zero ? int8_t{0} : int8_code(value, scales[k]);
    }
  }
}

void int8_columnwise_quant(const void* x, int dtype, int64_t rows, int64_t width, float threshold, int8_t* codes,
                           float* absmax, int threads) {
  with_dtype(dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(x);
    // No magnitude is at least NaN.
    const float limit = threshold > 0.0f ? threshold_in<T>(threshold) : bnb::float_of(0x7fc00000u);
    parallel(threads, ceil_divide(width, kColumnBlock), grain_of(max_of(1, rows * kColumnBlock)),
             [=](int64_t begin, int64_t end) {
               for (int64_t block = begin; block < end; ++block) {
                 const int64_t first = block * kColumnBlock;
                 quantize_int8_columns(from + first, rows, width, min_of(kColumnBlock, width - first), limit,
                                       codes + first, absmax + first);
               }
             });
  });
}

// --- back ------------------------------------------------------------------------------------------------

void int8_vectorwise_dequant(const int8_t* codes, const float* absmax, int64_t rows, int64_t width, float* out,
                             int threads) {
  constexpr float kStep = static_cast<float>(1.0 / 127.0);
  parallel(threads, rows, grain_of(max_of(width, 1)), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int8_t* from = codes + row * width;
      float* to = out + row * width;
      const float scale = absmax[row];
      int64_t k = 0;
      for (; k + kLanes <= width; k += kLanes) {
        // Bytes are loaded zero-extended; from their offset form the sign comes back by subtraction.
        const I32 bytes = load_bytes(reinterpret_cast<const uint8_t*>(from + k)) ^ splat(0x80);
        store(to + k, to_float(bytes - splat(0x80)) * splat(scale) * splat(kStep));
      }
      for (; k < width; ++k) {
        to[k] = static_cast<float>(from[k]) * scale * kStep;
      }
    }
  });
}

constexpr void fill_int8_quant(Kernels& kernels) {
  kernels.int8_vectorwise_quant = int8_vectorwise_quant;
  kernels.int8_columnwise_quant = int8_columnwise_quant;
  kernels.int8_vectorwise_dequant = int8_vectorwise_dequant;
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
