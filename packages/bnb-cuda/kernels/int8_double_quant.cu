// int8 quantization by rows and by columns at once: a pass over the values for the statistics of both, a pass for the
// codes of both.
//
// A thread has 8 neighbouring columns of a band of rows in both passes. The second pass begins with the bands that the
// first one ended with: the second-level cache still holds some of them.
#include <type_traits>

#include "int8_quant.h"

namespace bnb_gpu {
namespace {

constexpr char kName[] = "int8_double_quant";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlockColumns = kThreads * kPerVector;
// Rows whose largest values a warp keeps, one per lane, until the warps of a thread block compare theirs.
constexpr int kRowGroup = kLanes;
// Rows that a thread has under way.
template <class T>
constexpr int kUnroll = sizeof(T) == 4 ? 2 : 4;
// Columns that a thread block of the preparation clears per thread.
constexpr int kClearedPerThread = 4;

struct Sizes {
  int64_t rows, columns, band;
};

// The band of rows of a thread block.
struct Band {
  int64_t begin, end;

  __device__ __forceinline__ Band(const Sizes& sizes, unsigned index)
      : begin(index * sizes.band), end(min(begin + sizes.band, sizes.rows)) {}
};

// Columns of a thread. `kAligned`: their number is a multiple of 8.
template <bool kAligned>
struct Columns {
  int64_t first, count;

  __device__ __forceinline__ explicit Columns(int64_t columns)
      : first(static_cast<int64_t>(blockIdx.x) * kBlockColumns + threadIdx.x * kPerVector), count(columns) {}

  __device__ __forceinline__ bool has(int i) const { return (kAligned ? first : first + i) < count; }

  // Its values of one row, for the last time or not. Beyond the last column, zeros or those of the last columns again.
  template <bool kLast, class T>
  __device__ __forceinline__ Words<T, kPerVector> load(const T* row) const {
    if constexpr (kAligned) {
      const T* from = row + min(first, count - kPerVector);
      return words_of(kLast ? load_streaming<T, kPerVector>(from) : load_kept<T, kPerVector>(from));
    } else {
      Vector<T, kPerVector> values;
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        values.values[i] = has(i) ? row[first + i] : from_float<T>(0.0f);
      }
      return words_of(values);
    }
  }

  __device__ __forceinline__ void store(int8_t* row, const unsigned (&words)[kPerVector / 4]) const {
    if constexpr (kAligned) {
      __stcs(reinterpret_cast<uint2*>(row + first), make_uint2(words[0], words[1]));
    } else {
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        if (has(i)) {
          row[first + i] = static_cast<int8_t>(words[i / 4] >> (8 * (i % 4)));
        }
      }
    }
  }
};

// Statistics, flags and the number of outlier columns begin at zero.
__global__ void __launch_bounds__(kThreads)
    clear_statistics(int64_t rows, int64_t columns, float* __restrict__ row_absmax, float* __restrict__ column_absmax,
                     const Outliers outliers, int64_t words) {
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < max(rows, columns); i += step) {
    if (i < rows) {
      row_absmax[i] = 0.0f;
    }
    if (i < columns) {
      column_absmax[i] = 0.0f;
    }
    if (i < words) {
      outliers.flags[i] = 0;
    }
  }
}

// absmax of rows and columns, and the outlier columns. Magnitudes order as their bits do.
template <class T, bool kOutliers, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 5)
    double_statistics(const T* __restrict__ x, const Sizes sizes, float threshold, unsigned* __restrict__ row_absmax,
                      unsigned* __restrict__ column_absmax, const Outliers outliers) {
  // Two, so that one barrier for each group of rows is enough.
  __shared__ unsigned row_largest[2][kWarps][kRowGroup];
  __shared__ float column_largest[kBlockColumns];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const Columns<kAligned> columns(sizes.columns);
  const Band band(sizes, blockIdx.y);
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  x = after_wait(x);
  Words<T, kPerVector> largest = {};
  unsigned flagged = 0;
  int buffer = 0;
  for (int64_t group = band.begin; group < band.end; group += kRowGroup, buffer ^= 1) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(kRowGroup), band.end - group));
    unsigned own = 0;
    for (int r = 0; r < rows; r += kUnroll<T>) {
      Words<T, kPerVector> values[kUnroll<T>];
#pragma unroll
      for (int u = 0; u < kUnroll<T>; ++u) {
        // The last row again, where there are no more: a maximum does not mind.
        values[u] = columns.template load<false>(x + (group + min(r + u, rows - 1)) * sizes.columns);
      }
#pragma unroll
      for (int u = 0; u < kUnroll<T>; ++u) {
        unsigned bits = largest_number_bits(values[u]);
        if (kOutliers && bnb::float_of(bits) >= threshold) {
          const Lanes<kPerVector> numbers = values[u].floats();
#pragma unroll
          for (int i = 0; i < kPerVector; ++i) {
            if (fabsf(numbers.values[i]) >= threshold) {
              flagged |= 1u << i;
              values[u].clear(i);
            }
          }
          bits = largest_number_bits(values[u]);
        }
        largest = larger_magnitudes(largest, values[u]);
        bits = group_max<kLanes>(bits);
        own = lane == r + u ? bits : own;
      }
    }
    row_largest[buffer][warp][lane] = own;
    __syncthreads();
    if (warp == 0 && lane < rows) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        own = max(own, row_largest[buffer][w][lane]);
      }
      atomicMax(row_absmax + group + lane, own);
    }
  }
  // Through shared memory, so that neighbouring lanes have neighbouring columns.
  const Lanes<kPerVector> of_columns = largest.floats();
#pragma unroll
  for (int i = 0; i < kPerVector; ++i) {
    column_largest[threadIdx.x * kPerVector + i] = of_columns.values[i];
  }
  if (kOutliers && flagged != 0 && columns.has(0)) {
    atomicOr(outliers.flags + columns.first / 32, flagged << (columns.first % 32));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPerVector; ++i) {
    const int place = i * kThreads + threadIdx.x;
    const int64_t own = static_cast<int64_t>(blockIdx.x) * kBlockColumns + place;
    if (own < sizes.columns) {
      atomicMax(column_absmax + own, bnb::bits_of(column_largest[place]));
    }
  }
  if (kOutliers) {
    list_columns_at_last(outliers, sizes.columns);
  }
}

// Scales of a row or a column; zero for one without inliers, whose codes are zero.
__device__ __forceinline__ float scale_or_zero(float absmax) { return absmax > 0.0f ? scale_of(absmax) : 0.0f; }

// As `encode` for a number whose code is within the range: adding this to a float32 leaves the rounded value in the
// low byte of its pattern.
__device__ __forceinline__ unsigned encode_plain(float value, float scale) {
  return bnb::bits_of(value * scale + 12582912.0f);
}

// Low bytes of four words.
__device__ __forceinline__ unsigned low_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Codes of 8 neighbours.
struct CodeWords {
  unsigned words[kPerVector / 4];

  template <class CodeOf>
  __device__ __forceinline__ explicit CodeWords(CodeOf&& code_of) {
#pragma unroll
    for (int i = 0; i < kPerVector; i += 4) {
      words[i / 4] = low_bytes(code_of(i), code_of(i + 1), code_of(i + 2), code_of(i + 3));
    }
  }

  __device__ __forceinline__ CodeWords operator&(const CodeWords& other) const {
    CodeWords both = *this;
#pragma unroll
    for (int i = 0; i < kPerVector / 4; ++i) {
      both.words[i] &= other.words[i];
    }
    return both;
  }
};

// Codes of rows and columns. Outliers get code 0 in both, the other values of outlier columns in those of rows.
template <class T, bool kOutliers, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4)
    double_codes(const T* __restrict__ x, const Sizes sizes, float threshold, const float* __restrict__ row_absmax,
                 const float* __restrict__ column_absmax, const unsigned* __restrict__ flags,
                 int8_t* __restrict__ row_codes, int8_t* __restrict__ column_codes) {
  const Columns<kAligned> columns(sizes.columns);
  const Band band(sizes, gridDim.y - 1 - blockIdx.y);
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  if (!columns.has(0)) {
    return;
  }
  x = after_wait(x);
  row_absmax = after_wait(row_absmax);
  column_absmax = after_wait(column_absmax);
  const unsigned cleared = kOutliers ? after_wait(flags)[columns.first / 32] >> (columns.first % 32) : 0u;
  const CodeWords kept([&](int i) { return cleared >> i & 1u ? 0u : 0xffu; });
  // From here on values are not encoded the plain way.
  const unsigned limit = kOutliers ? bnb::bits_of(threshold) : 0x7f800000u;
  const auto column_largest = [&](int i) { return columns.has(i) ? column_absmax[columns.first + i] : 0.0f; };
  float scale[kPerVector];
  bool is_plain = true;
#pragma unroll
  for (int i = 0; i < kPerVector; ++i) {
    scale[i] = scale_or_zero(column_largest(i));
    is_plain = is_plain && !isinf(scale[i]);
  }
  for (int64_t first = band.begin; first < band.end; first += kUnroll<T>) {
    Words<T, kPerVector> values[kUnroll<T>];
    float largest[kUnroll<T>];
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) {
      const int64_t row = min(first + u, band.end - 1);
      values[u] = columns.template load<true>(x + row * sizes.columns);
      largest[u] = row_absmax[row];
    }
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) {
      const int64_t row = first + u;
      if (row < band.end) {
        const float row_scale = scale_or_zero(largest[u]);
        const Lanes<kPerVector> numbers = values[u].floats();
        const auto value_of = [&](int i) { return numbers.values[i]; };
        const auto store = [&](CodeWords of_row, const CodeWords& of_column) {
          if (kOutliers) {
            of_row = of_row & kept;
          }
          columns.store(row_codes + row * sizes.columns, of_row.words);
          columns.store(column_codes + row * sizes.columns, of_column.words);
        };
        const Largest own = largest_magnitude(values[u]);
        if (is_plain && !isinf(row_scale) && !own.has_nan && own.bits < limit) {
          store(CodeWords([&](int i) { return encode_plain(value_of(i), row_scale); }),
                CodeWords([&](int i) { return encode_plain(value_of(i), scale[i]); }));
        } else {
          const auto code_of = [&](int i, float absmax, float own_scale) {
            const bool is_outlier = kOutliers && fabsf(value_of(i)) >= threshold;
            return is_outlier ? 0u : static_cast<unsigned>(encode(value_of(i), absmax, own_scale));
          };
          store(CodeWords([&](int i) { return code_of(i, largest[u], row_scale); }),
                CodeWords([&](int i) { return code_of(i, column_largest(i), scale[i]); }));
        }
      }
    }
  }
}

template <class T, bool kOutliers, bool kAligned>
void quantize(const Launch& launch, const T* x, int64_t rows, int64_t columns, float threshold, int8_t* row_codes,
              int8_t* column_codes, float* row_absmax, float* column_absmax, const Outliers& outliers) {
  const int64_t across = ceil_div(columns, kBlockColumns);
  const int64_t bands = ceil_div(static_cast<int64_t>(launch.processors()) * 8, across);
  const Sizes sizes{rows, columns, ceil_div(rows, bands)};
  const dim3 blocks(static_cast<unsigned>(across), static_cast<unsigned>(ceil_div(rows, sizes.band)));
  launch_dependent(double_statistics<T, kOutliers, kAligned>, {blocks, kThreads}, launch, kName, x, sizes, threshold,
                   reinterpret_cast<unsigned*>(row_absmax), reinterpret_cast<unsigned*>(column_absmax), outliers);
  launch_dependent(double_codes<T, kOutliers, kAligned>, {blocks, kThreads}, launch, kName, x, sizes, threshold,
                   row_absmax, column_absmax, outliers.flags, row_codes, column_codes);
}

}  // namespace

void int8_double_quantize(const Launch& launch, const void* x, int dtype, int64_t rows, int64_t columns,
                          float threshold, int8_t* row_codes, int8_t* column_codes, float* row_absmax,
                          float* column_absmax, const Outliers& outliers) {
  if (columns == 0) {
    return int8_quantize_rows(launch, x, dtype, rows, columns, 0.0f, row_codes, row_absmax, outliers, true);
  }
  const bool has_outliers = threshold > 0.0f;
  const int64_t words = has_outliers ? column_words(columns) : 0;
  const int64_t cleared = ceil_div(rows > columns ? rows : columns, kThreads * kClearedPerThread);
  launch_dependent(clear_statistics, {dim3(launch.grid(cleared, 8)), kThreads}, launch, kName, rows, columns,
                   row_absmax, column_absmax, outliers, words);
  if (rows == 0) {
    if (has_outliers) {
      clear_count(launch, outliers, kName);
    }
    return;
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(x);
    const auto go = [&](auto outliers_too, auto aligned) {
      quantize<T, decltype(outliers_too)::value, decltype(aligned)::value>(
          launch, from, rows, columns, threshold, row_codes, column_codes, row_absmax, column_absmax, outliers);
    };
    if (columns % kPerVector == 0) {
      has_outliers ? go(std::true_type{}, std::true_type{}) : go(std::false_type{}, std::true_type{});
    } else {
      has_outliers ? go(std::true_type{}, std::false_type{}) : go(std::false_type{}, std::false_type{});
    }
  });
  check_launch(kName);
}

}  // namespace bnb_gpu
