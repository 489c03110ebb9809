// Row-wise int8 quantization of LLM.int8(), with outlier columns found on the device.
//
// Few rows whose outlier columns get code 0 take one launch (int8_quant_few.cu). Otherwise each row keeps flags of its
// own, which the product merges, or the next launch if there are more; of very many rows, the last thread block lists
// the columns that all of them have flagged.
#include <type_traits>

#include "int8_quant.h"

namespace bnb_gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kMergeThreads = 1024;
// Rows whose flags one thread block merges, and bytes of these; and bytes that each thread block of a product does.
constexpr int64_t kMostMergedRows = 256, kMostMerged = 1 << 18, kMostMergedByProduct = 7 << 14;

// Whether rows keep flags of their own.
bool merges_flags(int64_t rows, int64_t columns) {
  return rows > 0 && rows <= kMostMergedRows && columns > 0 && columns % kPerVector == 0 && columns <= kMostColumns &&
         rows * row_flag_bytes(columns) <= kMostMerged;
}

// One thread block per row, the row in registers: columns a multiple of 8, of which a thread has up to so many vectors.
// `own_flags`: those of the rows, if they keep any.
template <class T, int kRowThreads, int kVectors>
__global__ void __launch_bounds__(kRowThreads)
    quantize_row(const T* __restrict__ x, int columns, float threshold, int8_t* __restrict__ codes,
                 float* __restrict__ absmax, const Outliers outliers, uint8_t* __restrict__ own_flags) {
  __shared__ unsigned scratch[kLanes];
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  const int64_t row = blockIdx.x;
  const T* from = after_wait(x) + row * columns;
  const int64_t flag_bytes = row_flag_bytes(columns);
  Vector<T, kPerVector> values[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kRowThreads + threadIdx.x) * kPerVector;
    if (column < columns) {
      values[v] = load_streaming<T, kPerVector>(from + column);
    }
  }
  unsigned bits = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kRowThreads + threadIdx.x) * kPerVector;
    unsigned flagged = 0;
    if (column < columns) {
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        const float value = to_float(values[v].values[i]);
        bits = max(bits, inlier_bits(value, threshold));
        flagged |= threshold > 0.0f && fabsf(value) >= threshold ? 1u << i : 0u;
      }
    }
    if (own_flags == nullptr) {
      for (; flagged != 0; flagged &= flagged - 1) {
        flag_column(outliers.flags, column + __ffs(static_cast<int>(flagged)) - 1);
      }
    } else if (column < flag_bytes * 8) {
      own_flags[row * flag_bytes + column / kPerVector] = static_cast<uint8_t>(flagged);
    }
  }
  bits = block_max(bits, scratch);
  const float largest = bnb::float_of(bits), scale = scale_of(largest);
  if (threadIdx.x == 0) {
    absmax[row] = largest;
  }
  if (own_flags != nullptr && row == 0 && threadIdx.x < Outliers::kCountWords) {
    outliers.count[threadIdx.x] = 0;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kRowThreads + threadIdx.x) * kPerVector;
    if (column < columns) {
      Vector<int8_t, kPerVector> out;
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        out.values[i] = encode(to_float(values[v].values[i]), largest, scale);
        if (threshold > 0.0f && fabsf(to_float(values[v].values[i])) >= threshold) {
          out.values[i] = 0;
        }
      }
      *reinterpret_cast<Vector<int8_t, kPerVector>*>(codes + row * columns + column) = out;
    }
  }
  if (threshold > 0.0f && own_flags == nullptr) {
    list_columns_at_last(outliers, columns);
  }
}

// Lists the columns that rows have flagged. One thread block, whose threads share the rows.
__global__ void __launch_bounds__(kMergeThreads)
    merge_flags(const uint8_t* __restrict__ own_flags, int rows, int columns, const Outliers outliers) {
  __shared__ unsigned merged[kMergedWords];
  clear_merged<kMergeThreads>(merged, columns);
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  __syncthreads();
  merge_rows<kMergeThreads>(merged, after_wait(own_flags), rows, columns, static_cast<int>(threadIdx.x));
  __syncthreads();
  list_columns(outliers, columns, [&](int64_t word) {
    outliers.flags[word] = merged[word];
    return merged[word];
  });
}

// Any number of columns, in two passes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_row_any(const T* __restrict__ x, int64_t columns, float threshold, int8_t* __restrict__ codes,
                     float* __restrict__ absmax, const Outliers outliers) {
  __shared__ unsigned scratch[kLanes];
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  const int64_t row = blockIdx.x;
  const T* from = after_wait(x) + row * columns;
  unsigned bits = 0;
  for (int64_t i = threadIdx.x; i < columns; i += kThreads) {
    const float value = to_float(from[i]);
    bits = max(bits, inlier_bits(value, threshold));
    if (threshold > 0.0f && fabsf(value) >= threshold) {
      flag_column(outliers.flags, i);
    }
  }
  bits = block_max(bits, scratch);
  const float largest = bnb::float_of(bits), scale = scale_of(largest);
  if (threadIdx.x == 0) {
    absmax[row] = largest;
  }
  for (int64_t i = threadIdx.x; i < columns; i += kThreads) {
    const float value = to_float(from[i]);
    codes[row * columns + i] = threshold > 0.0f && fabsf(value) >= threshold ? 0 : encode(value, largest, scale);
  }
  if (threshold > 0.0f) {
    list_columns_at_last(outliers, columns);
  }
}

// Begins flags at zero. A dependent launch, which a memset is not.
__global__ void __launch_bounds__(kThreads) clear_words(unsigned* __restrict__ words, int64_t count) {
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    words[i] = 0;
  }
}

// Gives the listed columns code 0.
__global__ void __launch_bounds__(kThreads)
    clear_columns(int8_t* __restrict__ codes, int64_t rows, int64_t columns, const int* __restrict__ listed,
                  const int* __restrict__ count) {
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  listed = after_wait(listed);
  const int64_t total = rows * *after_wait(count);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    codes[i % rows * columns + listed[i / rows]] = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_rows(const int8_t* __restrict__ codes, const float* __restrict__ absmax, int64_t total, int64_t columns,
                    T* __restrict__ out) {
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerVector; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads * kPerVector) {
    if (columns % kPerVector == 0) {
      const Vector<int8_t, kPerVector> in = load_streaming<int8_t, kPerVector>(codes + i);
      const float scale = absmax[i / columns];
      Vector<T, kPerVector> values;
#pragma unroll
      for (int v = 0; v < kPerVector; ++v) {
        values.values[v] = from_float<T>(in.values[v] * scale * (1.0f / kLargestCode));
      }
      *reinterpret_cast<Vector<T, kPerVector>*>(out + i) = values;
    } else {
      for (int64_t j = i; j < i + kPerVector && j < total; ++j) {
        out[j] = from_float<T>(codes[j] * absmax[j / columns] * (1.0f / kLargestCode));
      }
    }
  }
}

template <int kValue>
using Number = std::integral_constant<int, kValue>;

template <class T>
void quantize(const Launch& launch, const T* x, int64_t rows, int64_t columns, float threshold, int8_t* codes,
              float* absmax, const Outliers& outliers, uint8_t* own_flags) {
  const dim3 blocks(static_cast<unsigned>(rows));
  if (columns % kPerVector == 0 && columns <= kMostColumns) {
    const auto go = [&](auto threads, auto vectors) {
      constexpr int kRowThreads = decltype(threads)::value;
      launch_dependent(quantize_row<T, kRowThreads, decltype(vectors)::value>, {blocks, kRowThreads}, launch,
                       kQuantization, x, static_cast<int>(columns), threshold, codes, absmax, outliers, own_flags);
    };
    // As many threads as there are vectors in a row, where rows do not occupy all multiprocessors anyway.
    if (rows <= 2 * launch.processors() && columns > kThreads * kPerVector) {
      return columns <= 512 * kPerVector    ? go(Number<512>{}, Number<1>{})
             : columns <= 1024 * kPerVector ? go(Number<1024>{}, Number<1>{})
                                            : go(Number<1024>{}, Number<2>{});
    }
    switch (ceil_div(columns, kThreads * kPerVector)) {
      case 1:
        return go(Number<kThreads>{}, Number<1>{});
      case 2:
        return go(Number<kThreads>{}, Number<2>{});
      case 3:
      case 4:
        return go(Number<kThreads>{}, Number<4>{});
      default:
        return go(Number<kThreads>{}, Number<8>{});
    }
  }
  launch_dependent(quantize_row_any<T>, {blocks, kThreads}, launch, kQuantization, x, columns, threshold, codes, absmax,
                   outliers);
}

void prepare(const Launch& launch, const Outliers& outliers, int64_t rows, int64_t columns) {
  const int64_t words = column_words(columns);
  launch_dependent(clear_words, {dim3(launch.grid(ceil_div(words, kThreads), 4)), kThreads}, launch, kQuantization,
                   outliers.flags, words);
  if (rows == 0) {
    clear_count(launch, outliers, kQuantization);
  }
}

void clear(const Launch& launch, const Outliers& outliers, int8_t* codes, int64_t rows, int64_t columns) {
  launch_dependent(clear_columns, {dim3(launch.grid(ceil_div(rows * 16, kThreads), 4)), kThreads}, launch,
                   kQuantization, codes, rows, columns, outliers.columns, outliers.count);
}

}  // namespace

int64_t outlier_flag_words(int64_t rows, int64_t columns) {
  const int64_t merged_bytes = merges_flags(rows, columns) ? kFlagVector + rows * row_flag_bytes(columns) : 0;
  return column_words(columns) + merged_bytes / static_cast<int64_t>(sizeof(unsigned));
}

bool product_merges_flags(int64_t rows, int64_t columns, bool cleared) {
  return !cleared && merges_flags(rows, columns) && rows * row_flag_bytes(columns) <= kMostMergedByProduct;
}

void int8_quantize_rows(const Launch& launch, const void* x, int dtype, int64_t rows, int64_t columns, float threshold,
                        int8_t* codes, float* absmax, const Outliers& outliers, bool cleared) {
  const bool finds = threshold > 0.0f, merges = finds && merges_flags(rows, columns);
  // Where no code waits for other rows, many thread blocks and a second launch are faster.
  if (finds && (cleared || !merges) &&
      int8_quantize_few_rows(launch, x, dtype, rows, columns, threshold, codes, absmax, outliers, cleared)) {
    return;
  }
  if (finds && columns > 0 && !merges) {
    prepare(launch, outliers, rows, columns);
  }
  uint8_t* own_flags = merges ? row_flags(outliers, columns) : nullptr;
  if (rows > 0) {
    with_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      quantize<T>(launch, static_cast<const T*>(x), rows, columns, threshold, codes, absmax, outliers, own_flags);
    });
  }
  if (merges && !product_merges_flags(rows, columns, cleared)) {
    launch_dependent(merge_flags, {dim3(1), kMergeThreads}, launch, kQuantization, own_flags, static_cast<int>(rows),
                     static_cast<int>(columns), outliers);
  }
  if (finds && cleared && rows > 0 && columns > 0) {
    clear(launch, outliers, codes, rows, columns);
  }
  check_launch("int8_vectorwise_quant");
}

void int8_dequantize_rows(const Launch& launch, const int8_t* codes, const float* absmax, int64_t rows, int64_t columns,
                          void* out, int dtype) {
  const int64_t total = rows * columns;
  if (total == 0) {
    return;
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dequantize_rows<T><<<launch.grid(ceil_div(total, kThreads * kPerVector), 16), kThreads, 0, launch.stream()>>>(
        codes, absmax, total, columns, static_cast<T*>(out));
  });
  check_launch("int8_vectorwise_dequant");
}

}  // namespace bnb_gpu
