// int8 products with many rows of activations: 128 x 128 tiles through a ring in shared memory, and the
// last step alone for a product that a library computed.
#include <type_traits>

#include "copies.h"
#include "int8_gemm.h"

namespace bnb_gpu {
namespace {

constexpr int kRowWarps = 4;    // 32 rows of the weight each
constexpr int kTokenWarps = 2;  // 64 rows of activations each
constexpr int kThreads = kRowWarps * kTokenWarps * kLanes;
constexpr int kTile = 128;
constexpr int kRowTiles = 2, kTokenTiles = 8;
constexpr int kStep = 128;  // columns per stage
constexpr int kStages = 3;
constexpr int kOperandBytes = kTile * kStep;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kRingBytes = kStages * kStageBytes;
constexpr int kPitch = kTile + 4;  // of the sums in shared memory, in integers
constexpr int kBatch = 32;         // outlier columns at a time

// Place of a 16-byte piece of a row: odd rows swap their halves, so that rows g and g + 1 of an operand,
// which are read together, use all banks.
__device__ __forceinline__ int place(int row, int piece) { return row * kStep + (piece ^ (row & 1) << 2) * 16; }

__device__ __forceinline__ void stage_operand(unsigned char* to, const int8_t* from, int first, int rows, int k,
                                              int column) {
  for (int i = threadIdx.x; i < kTile * (kStep / 16); i += kThreads) {
    const int row = i / (kStep / 16), piece = i % (kStep / 16);
    const bool valid = first + row < rows && column + piece * 16 < k;
    const int8_t* source = valid ? from + static_cast<int64_t>(first + row) * k + column + piece * 16 : from;
    copy_async(to + place(row, piece), source, valid);
  }
}

template <class T, bool kOutliers>
__global__ void __launch_bounds__(kThreads, 2)
    int8_tiles(const int8_t* __restrict__ a, const int8_t* __restrict__ b, int m, int n, int k,
               const float* __restrict__ a_absmax, const float* __restrict__ b_absmax, const T* __restrict__ values,
               const Outliers outliers, const void* __restrict__ bias, int bias_dtype, T* __restrict__ out) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int row_warp = warp % kRowWarps, token_warp = warp / kRowWarps;
  const int g = lane / 4, t = lane % 4;
  // Neighbouring thread blocks share rows of the weight, which then stay in the cache.
  const int first_token = blockIdx.x * kTile, first_row = blockIdx.y * kTile;
  const int steps = (k + kStep - 1) / kStep;

  const auto stage = [&](int step) {
    if (step < steps) {
      unsigned char* slot = shared + step % kStages * kStageBytes;
      stage_operand(slot, b, first_row, n, k, step * kStep);
      stage_operand(slot + kOperandBytes, a, first_token, m, k, step * kStep);
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    stage(s);
  }
  int sums[kRowTiles][kTokenTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    stage(step + kStages - 1);
    const unsigned char* weights = shared + step % kStages * kStageBytes;
    const unsigned char* activations = weights + kOperandBytes;
#pragma unroll
    for (int half = 0; half < kStep / 64; ++half) {
      unsigned first[kRowTiles][4], second[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int row = row_warp * 32 + 16 * r + g;
        const uint4 upper = *reinterpret_cast<const uint4*>(weights + place(row, half * 4 + t));
        const uint4 lower = *reinterpret_cast<const uint4*>(weights + place(row + 8, half * 4 + t));
        first[r][0] = upper.x, first[r][1] = lower.x, first[r][2] = upper.y, first[r][3] = lower.y;
        second[r][0] = upper.z, second[r][1] = lower.z, second[r][2] = upper.w, second[r][3] = lower.w;
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = token_warp * 64 + 8 * j + g;
        const uint4 right = *reinterpret_cast<const uint4*>(activations + place(token, half * 4 + t));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_tile8(sums[r][j], first[r], right.x, right.y);
          multiply_tile8(sums[r][j], second[r], right.z, right.w);
        }
      }
    }
  }

  // Through shared memory, so that neighbouring threads write neighbouring columns of the result.
  wait_for_copies<0>();
  __syncthreads();
  int* total = reinterpret_cast<int*>(shared);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_warp * 32 + 16 * r + 8 * (i / 2) + g;
        const int token = token_warp * 64 + 8 * j + 2 * t + i % 2;
        total[token * kPitch + row] = sums[r][j][i];
      }
    }
  }
  __syncthreads();

  // A thread owns one column of the result in every second row.
  constexpr int kOwn = kTile / 2;
  const int column = threadIdx.x % kTile, parity = threadIdx.x / kTile;
  const int row = first_row + column;
  float* sum_of = reinterpret_cast<float*>(total);
  const float scale = row < n ? b_absmax[row] : 0.0f;
  const float offset = row < n ? load_bias(bias, bias_dtype, row) : 0.0f;
  for (int i = 0; i < kOwn; ++i) {
    const int token = 2 * i + parity;
    if (first_token + token < m) {
      const int product = total[token * kPitch + column];
      sum_of[token * kPitch + column] = scaled_product(product, a_absmax[first_token + token], scale, 0.0f, offset);
    }
  }
  if constexpr (kOutliers) {
    constexpr int kSumBytes = kTile * kPitch * 4;
    float* left = reinterpret_cast<float*>(shared + kSumBytes);  // kBatch x kTile: outliers of the activations
    const int count = *outliers.count;
    for (int base = 0; base < count; base += kBatch) {
      const int batch = min(kBatch, count - base);
      __syncthreads();
      for (int i = threadIdx.x; i < batch * kTile; i += kThreads) {
        const int token = first_token + i % kTile;
        left[i] =
            token < m ? to_float(values[static_cast<int64_t>(token) * k + outliers.columns[base + i / kTile]]) : 0.0f;
      }
      __syncthreads();
      float weights[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        weights[j] = j < batch && row < n
                         ? b[static_cast<int64_t>(row) * k + outliers.columns[base + j]] * (scale * (1.0f / 127.0f))
                         : 0.0f;
      }
      for (int i = 0; i < kOwn; ++i) {
        const int token = 2 * i + parity;
        float sum = sum_of[token * kPitch + column];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (j < batch) {
            sum = __fmaf_rn(left[j * kTile + token], weights[j], sum);
          }
        }
        sum_of[token * kPitch + column] = sum;
      }
    }
  }
  if (row < n) {
    for (int i = 0; i < kOwn; ++i) {
      const int token = 2 * i + parity;
      if (first_token + token < m) {
        out[static_cast<int64_t>(first_token + token) * n + row] = from_float<T>(sum_of[token * kPitch + column]);
      }
    }
  }
}

// The last step alone. A thread block takes 256 columns of a few rows.
template <class T, bool kOutliers>
__global__ void __launch_bounds__(256)
    finish(const int32_t* __restrict__ product, const int8_t* __restrict__ b, int64_t m, int64_t n, int64_t k,
           const float* __restrict__ a_absmax, const float* __restrict__ b_absmax, const T* __restrict__ values,
           const Outliers outliers, const void* __restrict__ bias, int bias_dtype, T* __restrict__ out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (row >= n) {
    return;
  }
  const float scale = b_absmax[row], offset = load_bias(bias, bias_dtype, row);
  const int count = kOutliers ? *outliers.count : 0;
  for (int64_t token = blockIdx.y; token < m; token += gridDim.y) {
    const float corrected =
        kOutliers ? outlier_product(values + token * k, b + row * k, outliers.columns, count, scale) : 0.0f;
    out[token * n + row] =
        from_float<T>(scaled_product(product[token * n + row], a_absmax[token], scale, corrected, offset));
  }
}

constexpr int shared_bytes(bool outliers) {
  constexpr int kSums = kTile * kPitch * 4;
  const int last = kSums + (outliers ? kBatch * kTile * 4 : 0);
  return last > kRingBytes ? last : kRingBytes;
}

}  // namespace

void int8_gemm_tiles(const Launch& launch, const Gemm8& p) {
  with_dtype(p.dtype, [&](auto type) {
    with_outliers(p, [&](auto outliers) {
      using T = typename decltype(type)::type;
      constexpr bool kOutliers = decltype(outliers)::value;
      constexpr int kShared = shared_bytes(kOutliers);
      const auto kernel = int8_tiles<T, kOutliers>;
      check(gpuFuncSetAttribute(reinterpret_cast<const void*>(kernel), gpuFuncAttributeMaxDynamicSharedMemorySize,
                                kShared),
            "int8_linear: asking for shared memory");
      const dim3 grid(static_cast<unsigned>(ceil_div(p.m, kTile)), static_cast<unsigned>(ceil_div(p.n, kTile)));
      kernel<<<grid, kThreads, kShared, launch.stream()>>>(
          p.a, p.b, static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), p.a_absmax, p.b_absmax,
          static_cast<const T*>(p.values), p.outliers, p.bias, p.bias_dtype, static_cast<T*>(p.out));
    });
  });
  check_launch("int8_linear");
}

void int8_finish(const Launch& launch, const int32_t* product, const Gemm8& p) {
  if (p.m * p.n == 0) {
    return;
  }
  with_dtype(p.dtype, [&](auto type) {
    with_outliers(p, [&](auto outliers) {
      using T = typename decltype(type)::type;
      constexpr bool kOutliers = decltype(outliers)::value;
      const int64_t across = ceil_div(p.n, 256);
      const int64_t bands = ceil_div(static_cast<int64_t>(launch.processors()) * 16, across);
      const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(bands < p.m ? bands : p.m));
      finish<T, kOutliers><<<grid, 256, 0, launch.stream()>>>(product, p.b, p.m, p.n, p.k, p.a_absmax, p.b_absmax,
                                                              static_cast<const T*>(p.values), p.outliers, p.bias,
                                                              p.bias_dtype, static_cast<T*>(p.out));
    });
  });
  check_launch("int8_mm_dequant");
}

}  // namespace bnb_gpu
