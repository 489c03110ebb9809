// Row-wise int8 quantization of LLM.int8(), with outlier columns found on the device.
#include <type_traits>

#include "int8_quant.h"

namespace bnb_gpu {
namespace {

constexpr int kThreads = 256;

// One thread block per row, the row in registers: columns a multiple of 8, at most kVectors * 2048.
template <class T, int kVectors>
__global__ void __launch_bounds__(kThreads)
    quantize_row(const T* __restrict__ x, int columns, float threshold, int8_t* __restrict__ codes,
                 float* __restrict__ absmax, const Outliers outliers) {
  __shared__ unsigned scratch[kLanes];
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  const int64_t row = blockIdx.x;
  const T* from = after_wait(x) + row * columns;
  Vector<T, kPerVector> values[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kThreads + threadIdx.x) * kPerVector;
    if (column < columns) {
      values[v] = load_streaming<T, kPerVector>(from + column);
    }
  }
  unsigned bits = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kThreads + threadIdx.x) * kPerVector;
    if (column < columns) {
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        const float value = to_float(values[v].values[i]);
        bits = max(bits, inlier_bits(value, threshold));
        if (threshold > 0.0f && fabsf(value) >= threshold) {
          flag_column(outliers.flags, column + i);
        }
      }
    }
  }
  bits = block_max(bits, scratch);
  const float largest = bnb::float_of(bits), scale = scale_of(largest);
  if (threadIdx.x == 0) {
    absmax[row] = largest;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kThreads + threadIdx.x) * kPerVector;
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
  if (threshold > 0.0f) {
    list_columns_at_last(outliers, columns);
  }
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

template <class T>
void quantize(const Launch& launch, const T* x, int64_t rows, int64_t columns, float threshold, int8_t* codes,
              float* absmax, const Outliers& outliers) {
  const Grid grid{dim3(static_cast<unsigned>(rows)), kThreads};
  if (columns % kPerVector == 0 && columns <= 16384) {
    const int vectors = static_cast<int>(ceil_div(columns, kThreads * kPerVector));
    const auto go = [&](auto count) {
      launch_dependent(quantize_row<T, decltype(count)::value>, grid, launch, kQuantization, x,
                       static_cast<int>(columns), threshold, codes, absmax, outliers);
    };
    switch (vectors) {
      case 1:
        return go(std::integral_constant<int, 1>{});
      case 2:
        return go(std::integral_constant<int, 2>{});
      case 3:
      case 4:
        return go(std::integral_constant<int, 4>{});
      default:
        return go(std::integral_constant<int, 8>{});
    }
  }
  launch_dependent(quantize_row_any<T>, grid, launch, kQuantization, x, columns, threshold, codes, absmax, outliers);
}

void prepare(const Launch& launch, const Outliers& outliers, int64_t rows, int64_t columns) {
  check(gpuMemsetAsync(outliers.flags, 0, (ceil_div(columns, 32) + 1) * 4, launch.stream()), kQuantization);
  if (rows == 0) {
    clear_count(launch, outliers, kQuantization);
  }
}

void clear(const Launch& launch, const Outliers& outliers, int8_t* codes, int64_t rows, int64_t columns) {
  launch_dependent(clear_columns, {dim3(launch.grid(ceil_div(rows * 16, kThreads), 4)), kThreads}, launch,
                   kQuantization, codes, rows, columns, outliers.columns, outliers.count);
}

}  // namespace

void int8_quantize_rows(const Launch& launch, const void* x, int dtype, int64_t rows, int64_t columns, float threshold,
                        int8_t* codes, float* absmax, const Outliers& outliers, bool cleared) {
  if (threshold > 0.0f &&
      int8_quantize_few_rows(launch, x, dtype, rows, columns, threshold, codes, absmax, outliers, cleared)) {
    return;
  }
  if (threshold > 0.0f && columns > 0) {
    prepare(launch, outliers, rows, columns);
  }
  if (rows > 0) {
    with_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      quantize<T>(launch, static_cast<const T*>(x), rows, columns, threshold, codes, absmax, outliers);
    });
  }
  if (threshold > 0.0f && cleared && rows > 0 && columns > 0) {
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
