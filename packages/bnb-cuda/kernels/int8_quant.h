// What the kernels of int8 quantization share: scales, codes, and the list of outlier columns.
#pragma once

#include "block.h"
#include "dependent.h"
#include "int8_flags.h"

namespace bnb_gpu {

constexpr int kPerVector = 8;
constexpr float kLargestCode = 127.0f;
// For messages.
constexpr char kQuantization[] = "int8 quantization";

// Division as fast as the hardware has it: the bits of bitsandbytes 0.50.2.
__device__ __forceinline__ float scale_of(float absmax) { return __fdividef(kLargestCode, absmax); }

// As the reference: the reciprocal first, the quotient first where that overflows; NaN gives 0.
__device__ __forceinline__ int8_t encode(float value, float absmax, float scale) {
  const float scaled = isinf(scale) ? value / absmax * kLargestCode : value * scale;
  return static_cast<int8_t>(scaled == scaled ? __float2int_rn(scaled) : 0);
}

// Magnitude of a value that counts in absmax, on the bits; neither NaN nor an outlier does.
__device__ __forceinline__ unsigned inlier_bits(float value, float threshold) {
  const unsigned bits = bnb::magnitude_bits_or_zero(value);
  return threshold > 0.0f && bnb::float_of(bits) >= threshold ? 0u : bits;
}

// Without a row no kernel writes the number of columns.
inline void clear_count(const Launch& launch, const Outliers& outliers, const char* what) {
  check(gpuMemsetAsync(outliers.count, 0, Outliers::kCountWords * sizeof(int), launch.stream()), what);
}

// In global memory. A flag that is known is not set again, since all rows would wait for each other.
__device__ __forceinline__ void flag_column(unsigned* flags, int64_t column) {
  const unsigned bit = 1u << (column % 32);
  if ((*reinterpret_cast<volatile unsigned*>(flags + column / 32) & bit) == 0) {
    atomicOr(flags + column / 32, bit);
  }
}

__device__ __forceinline__ bool is_flagged(const unsigned* flags, int64_t column) {
  return (flags[column / 32] >> (column % 32) & 1u) != 0;
}

// Fills up a list of so many columns and writes their number. A warp at least calls this.
__device__ __forceinline__ void finish_list(const Outliers& outliers, int listed, int64_t all_columns) {
  const int thread = static_cast<int>(threadIdx.x % kLanes);
  static_assert(Outliers::kFilled == kLanes && Outliers::kCountWords <= kLanes, "a lane has one place of each");
  if (thread >= listed && thread < all_columns) {
    outliers.columns[thread] = 0;
  }
  if (thread < Outliers::kCountWords) {
    outliers.count[thread] = thread == 0 ? listed : 0;
  }
}

// Turns the flags of so many columns into an ascending list; `word_of` reads them. The whole thread block calls this.
template <class WordOf>
__device__ __forceinline__ void list_columns(const Outliers& outliers, int64_t all_columns, WordOf&& word_of) {
  __shared__ int ends[32];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  const int64_t words = (all_columns + 31) / 32;
  int listed = 0;
  for (int64_t base = 0; base < words; base += blockDim.x) {
    const int64_t word = base + threadIdx.x;
    unsigned bits = word < words ? word_of(word) : 0u;
    const int own = __popc(bits), up_to_own = sum_up_to_lane(own, lane);
    if (base > 0) {
      __syncthreads();
    }
    if (lane == kLanes - 1) {
      ends[group] = up_to_own;
    }
    __syncthreads();
    const int of_group = lane < groups ? ends[lane] : 0;
    int place = listed + group_sum<kLanes>(lane < group ? of_group : 0) + up_to_own - own;
    listed += group_sum<kLanes>(of_group);
    while (bits != 0) {
      const int bit = __ffs(static_cast<int>(bits)) - 1;
      outliers.columns[place++] = static_cast<int>(word * 32 + bit);
      bits &= bits - 1;
    }
  }
  if (group == 0) {
    finish_list(outliers, listed, all_columns);
  }
}

// The thread block that is the last to get here lists the columns that all of them have flagged. The word after the
// flags counts thread blocks.
__device__ __forceinline__ void list_columns_at_last(const Outliers& outliers, int64_t columns) {
  __shared__ bool is_last;
  const int64_t words = (columns + 31) / 32;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(outliers.flags + words, 1u) == gridDim.x * gridDim.y - 1;
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    list_columns(outliers, columns, [&](int64_t word) { return __ldcg(outliers.flags + word); });
  }
}

// A few rows with outliers, in one launch; false, with nothing done, if that is not the way for so many.
bool int8_quantize_few_rows(const Launch& launch, const void* x, int dtype, int64_t rows, int64_t columns,
                            float threshold, int8_t* codes, float* absmax, const Outliers& outliers, bool cleared);

}  // namespace bnb_gpu
