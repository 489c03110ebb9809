// 4-bit codes on the device: tables, the branch-free search, decoding, statistics.
#pragma once

#include <bnb/quant.h>

#include "block.h"
#include "kernels.h"

namespace bnb_gpu {

// Constant memory, so that an index known at run time costs no copy of the table.
namespace tables4 {
static __constant__ float kValues[2][16] = {{BNB_NF4_VALUES}, {BNB_FP4_VALUES}};
static __constant__ float kBoundaries[2][15] = {{BNB_NF4_GPU_BOUNDARIES}, {BNB_FP4_GPU_BOUNDARIES}};
static __constant__ uint8_t kOrder[2][16] = {{BNB_NF4_GPU_ORDER}, {BNB_FP4_GPU_ORDER}};
constexpr float kFp4Boundaries[15] = {BNB_FP4_GPU_BOUNDARIES};
constexpr unsigned kFp4Order[16] = {BNB_FP4_GPU_ORDER};
}  // namespace tables4

template <int kType>
struct Tables4 {
  __device__ static float value(int code) { return tables4::kValues[kType][code]; }
  __device__ static float boundary(int rank) { return tables4::kBoundaries[kType][rank]; }
  __device__ static unsigned code(int rank) { return tables4::kOrder[kType][rank]; }
};

// Finds the code of a scaled value in [-1, 1] with one table look-up and one comparison: the same
// result as bnb::rank_4bit on the boundaries of GPUs. NaN gets code 0.
//
// The value is rounded to a grid of 31 cells, narrower than the distance of any two boundaries, so each
// cell holds at most one of them; its entry has that boundary and the codes on either side. A cell
// knows boundaries a little beyond its border, too, which makes the rounding at the border harmless.
// FP4 has three boundaries around zero in one cell; two comparisons more decide there.
template <int kType>
struct Encoder4 {
  static constexpr int kCells = 64;
  static constexpr bool kTiny = kType == static_cast<int>(bnb::QuantType::kFp4);
  // NF4 codes ascend with the values.
  static constexpr bool kAscending = kType == static_cast<int>(bnb::QuantType::kNf4);
  // Adding this to a float32 leaves the rounded value, counted from kZeroCell, in the low bits of its
  // pattern. The arithmetic of NVIDIA's GPUs gives one pattern for NaN, with all of these bits set.
  static constexpr int kZeroCell = 16;
  static constexpr float kRounder = 12582912.0f + kZeroCell;
  static constexpr float kScale = 15.0f;
#ifdef BNB_HIP
  static constexpr bool kNanHasCell = false;
#else
  static constexpr bool kNanHasCell = true;
#endif

  const uint2* cells;

  // All threads of the block call this; the caller synchronises afterwards.
  __device__ static void build(uint2* shared) {
    for (int i = threadIdx.x; i < kCells; i += blockDim.x) {
      const int cell = i - kZeroCell;
      const float low = (cell - 0.5f) / kScale - 1e-4f, high = (cell + 0.5f) / kScale + 1e-4f;
      int rank = 0;
      for (int k = 0; k < 15; ++k) {
        rank += Tables4<kType>::boundary(k) < low;
      }
      if (kTiny && cell == 0) {
        rank = 7;
      }
      const bool crossed = rank < 15 && Tables4<kType>::boundary(rank < 15 ? rank : 14) <= high;
      const unsigned below = Tables4<kType>::code(rank), above = Tables4<kType>::code(crossed ? rank + 1 : rank);
      const bool is_nan = i == kCells - 1;
      shared[i] = make_uint2(bnb::bits_of(crossed && !is_nan ? Tables4<kType>::boundary(rank) : 2.0f),
                             is_nan ? 0u : below | above << 16);
    }
  }

  __device__ __forceinline__ unsigned operator()(float scaled) const {
    const unsigned cell = bnb::bits_of(__fmaf_rn(scaled, kScale, kRounder)) & (kCells - 1);
    const uint2 entry = cells[cell];
    const bool above = scaled > bnb::float_of(entry.x);
    if constexpr (kAscending) {
      const unsigned code = (entry.y & 0xffffu) + (above ? 1u : 0u);
      return kNanHasCell || scaled == scaled ? code : 0u;
    }
    unsigned code = above ? entry.y >> 16 : entry.y & 0xffffu;
    if (kTiny && cell == kZeroCell) {
      constexpr float kNegative = tables4::kFp4Boundaries[6], kPositive = tables4::kFp4Boundaries[8];
      constexpr unsigned kBelow = tables4::kFp4Order[6], kAbove = tables4::kFp4Order[9];
      code = scaled <= kNegative ? kBelow : code;
      code = scaled > kPositive ? kAbove : code;
    }
    return kNanHasCell || scaled == scaled ? code : 0u;
  }

  // For values beyond [-1, 1], as in a block whose absmax has no finite reciprocal.
  __device__ static unsigned any(float scaled) {
    int rank = 0;
    for (int k = 0; k < 15; ++k) {
      rank += scaled > Tables4<kType>::boundary(k);
    }
    return scaled == scaled ? Tables4<kType>::code(rank) : 0u;
  }
};

// absmax of a block. `kShift`: the nested block size is known to be a power of two.
template <bool kNested, bool kShift = false>
struct BlockScale {
  const Statistics statistics;
  const float* code;  // in shared memory
  float offset;
  int nested_shift;  // log2 of the nested block size, or -1

  // `shared` has room for 256 values. All threads call this; the caller synchronises afterwards.
  __device__ BlockScale(const Statistics& given, float* shared, int shift)
      : BlockScale(given, shared, shift, threadIdx.x, blockDim.x) {}

  // The same where only `threads` threads call it, of which this one is `thread`.
  __device__ BlockScale(const Statistics& given, float* shared, int shift, int thread, int threads)
      : statistics(given), code(shared), offset(kNested ? *given.offset : 0.0f), nested_shift(shift) {
    if (kNested) {
      for (int i = thread; i < 256; i += threads) {
        shared[i] = statistics.code[i < statistics.code_size ? i : statistics.code_size - 1];
      }
    }
  }

  // What memory holds of a block's absmax. Apart from `value`, so that loads can run ahead.
  struct Stored {
    float absmax;
    unsigned code;
  };

  __device__ __forceinline__ Stored fetch(int64_t block) const {
    if constexpr (!kNested) {
      return {statistics.absmax[block], 0u};
    } else {
      const int64_t outer = kShift || nested_shift >= 0 ? block >> nested_shift : block / statistics.nested_blocksize;
      return {statistics.absmax[outer], statistics.absmax_8bit[block]};
    }
  }

  __device__ __forceinline__ float value(const Stored& stored) const {
    if constexpr (!kNested) {
      return stored.absmax;
    } else {
      return bnb::nested_absmax(code[stored.code], stored.absmax, offset);
    }
  }

  __device__ __forceinline__ float operator()(int64_t block) const { return value(fetch(block)); }
};

// log2 of a power of two, -1 for other numbers.
inline int exact_log2(int64_t value) {
  if (value <= 0 || (value & (value - 1)) != 0) {
    return -1;
  }
  int shift = 0;
  while ((int64_t{1} << shift) < value) {
    ++shift;
  }
  return shift;
}

template <class Body>
void with_quant_type(int quant_type, Body&& body) {
  if (quant_type == static_cast<int>(bnb::QuantType::kNf4)) {
    body(std::integral_constant<int, static_cast<int>(bnb::QuantType::kNf4)>{});
  } else {
    body(std::integral_constant<int, static_cast<int>(bnb::QuantType::kFp4)>{});
  }
}

template <class Body>
void with_nested(const Statistics& statistics, Body&& body) {
  if (statistics.absmax_8bit != nullptr) {
    body(std::integral_constant<bool, true>{});
  } else {
    body(std::integral_constant<bool, false>{});
  }
}

}  // namespace bnb_gpu
