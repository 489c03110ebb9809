// int8 quantization of a few rows with outliers, in one launch: one thread block, or a cluster that finds the outlier
// columns together.
#include "int8_quant.h"

#ifndef BNB_HIP
#include <cooperative_groups.h>
#endif

namespace bnb_gpu {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kLanes;
// Elements for one thread block, and for a cluster of so many (compute capability 9.0 and later), in up to so many rows
// and in more. Beyond, more thread blocks are faster, though each of the steps is a launch then.
constexpr int64_t kMostElements = 1 << 13, kMostElementsOfFew = 14 << 14, kMostElementsOfCluster = 7 << 14;
constexpr int64_t kFewRows = 32;
constexpr int kCluster = 8;
// Vectors of values that a thread keeps between the statistics and the codes.
constexpr int kHeld = 2;

// Hands out flags in shared memory and the list of the columns that have one. A warp calls this, while others go on.
__device__ __forceinline__ void hand_out(const unsigned* flags, int columns, const Outliers& outliers) {
  for (int i = threadIdx.x % kLanes; i < (columns + 31) / 32; i += kLanes) {
    outliers.flags[i] = flags[i];
  }
  finish_list(outliers, list_flagged(flags, columns, columns, outliers.columns), columns);
}

// A few rows with outliers, everything in one launch of one thread block or cluster, whose warps share the rows.
// Columns: a multiple of 8.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_few_rows(const T* __restrict__ x, int rows, int columns, int block_rows, int warps_per_row,
                      float threshold, bool cleared, int8_t* __restrict__ codes, float* __restrict__ absmax,
                      const Outliers outliers) {
  __shared__ unsigned own_flags[kMostColumns / 32];
  [[maybe_unused]] __shared__ unsigned all_flags[kMostColumns / 32];
  __shared__ unsigned largest[kWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int group = warp / warps_per_row, member = warp % warps_per_row;
  const int row = static_cast<int>(blockIdx.x) * block_rows + group;
  const int words = (columns + 31) / 32, stride = warps_per_row * kLanes * kPerVector;
  const int first = (member * kLanes + lane) * kPerVector;
  const bool busy = group < block_rows && row < rows;
  for (int i = threadIdx.x; i < words; i += kThreads) {
    own_flags[i] = 0;
  }
  let_kernel_behind_begin();
  wait_for_kernel_ahead();
  const T* from = after_wait(x) + static_cast<int64_t>(row) * columns;
  // Of the values, of which a thread has a vector at each of its columns, it keeps the first few.
  Vector<T, kPerVector> held[kHeld] = {};
  const auto exists = [&](int column) { return busy && column < columns; };
  const auto load = [&](int column) { return *reinterpret_cast<const Vector<T, kPerVector>*>(from + column); };
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (exists(first + h * stride)) {
      held[h] = load(first + h * stride);
    }
  }
  __syncthreads();
  const auto for_each = [&](auto&& body) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (exists(first + h * stride)) {
        body(first + h * stride, held[h]);
      }
    }
#pragma unroll 4
    for (int column = first + kHeld * stride; exists(column); column += stride) {
      body(column, load(column));
    }
  };
  unsigned bits = 0;
  for_each([&](int column, const Vector<T, kPerVector>& values) {
    unsigned flagged = 0;
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) {
      const float value = to_float(values.values[i]);
      bits = max(bits, inlier_bits(value, threshold));
      flagged |= fabsf(value) >= threshold ? 1u << i : 0u;
    }
    if (flagged != 0) {
      atomicOr(own_flags + column / 32, flagged << (column % 32));
    }
  });
  bits = group_max<kLanes>(bits);
  if (lane == 0) {
    largest[warp] = bits;
  }
  const unsigned* flags = own_flags;
#if BNB_DEVICE_ARCH >= 900
  auto cluster = cooperative_groups::this_cluster();
  if (gridDim.x > 1) {
    cluster.sync();
    for (int i = threadIdx.x; i < words; i += kThreads) {
      unsigned word = 0;
#pragma unroll
      for (int b = 0; b < kCluster; ++b) {
        word |= *cluster.map_shared_rank(own_flags + i, b);
      }
      all_flags[i] = word;
    }
    flags = all_flags;
    // Until all have read them, none of the flags may go.
    cluster.barrier_arrive();
  }
#endif
  __syncthreads();
  // The warp that is the least likely to have a row.
  if (blockIdx.x == gridDim.x - 1 && warp == kWarps - 1) {
    hand_out(flags, columns, outliers);
  }
  for (int i = 0; i < warps_per_row; ++i) {
    bits = max(bits, largest[group * warps_per_row + i]);
  }
  const float most = bnb::float_of(bits), scale = scale_of(most);
  if (busy && member == 0 && lane == 0) {
    absmax[row] = most;
  }
  for_each([&](int column, const Vector<T, kPerVector>& values) {
    Vector<int8_t, kPerVector> out;
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) {
      const float value = to_float(values.values[i]);
      const bool is_cleared = fabsf(value) >= threshold || (cleared && is_flagged(flags, column + i));
      out.values[i] = is_cleared ? 0 : encode(value, most, scale);
    }
    *reinterpret_cast<Vector<int8_t, kPerVector>*>(codes + static_cast<int64_t>(row) * columns + column) = out;
  });
#if BNB_DEVICE_ARCH >= 900
  if (gridDim.x > 1) {
    cluster.barrier_wait();
  }
#endif
}

// How many thread blocks take all rows in one launch: 0 if that is not the way for so many.
int few_blocks(const Launch& launch, int64_t rows, int64_t columns) {
  if (rows <= 0 || columns <= 0 || columns > kMostColumns || columns % kPerVector != 0) {
    return 0;
  }
  if (rows <= kWarps && rows * columns <= kMostElements) {
    return 1;
  }
  const int64_t most = rows <= kFewRows ? kMostElementsOfFew : kMostElementsOfCluster;
  const bool fits = rows <= kCluster * kWarps && rows * columns <= most;
  return launch.capability() >= 90 && fits ? kCluster : 0;
}

}  // namespace

bool int8_quantize_few_rows(const Launch& launch, const void* x, int dtype, int64_t rows, int64_t columns,
                            float threshold, int8_t* codes, float* absmax, const Outliers& outliers, bool cleared) {
  const int blocks = few_blocks(launch, rows, columns);
  if (blocks == 0) {
    return false;
  }
  const int block_rows = static_cast<int>(ceil_div(rows, blocks));
  int warps_per_row = kWarps;
  while (warps_per_row * block_rows > kWarps) {
    warps_per_row /= 2;
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_dependent(quantize_few_rows<T>, {dim3(blocks), kThreads, 0, blocks}, launch, kQuantization,
                     static_cast<const T*>(x), static_cast<int>(rows), static_cast<int>(columns), block_rows,
                     warps_per_row, threshold, cleared, codes, absmax, outliers);
  });
  check_launch(kQuantization);
  return true;
}

}  // namespace bnb_gpu
