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
constexpr unsigned kFp4Order[16] = {BNB_FP4_GPU_ORDER};

// The ranks of NF4 are its codes. Those of FP4 by magnitude differ from them in one bit, the others say when.
constexpr bool is_in_this_order(unsigned rank) {
  const unsigned code = rank ^ (rank & 2u) << 1;
  return kFp4Order[8 + rank] == code && kFp4Order[7 - rank] == (code | 8u);
}
static_assert(is_in_this_order(0) && is_in_this_order(1) && is_in_this_order(2) && is_in_this_order(3) &&
              is_in_this_order(4) && is_in_this_order(5) && is_in_this_order(6) && is_in_this_order(7));
}  // namespace tables4

template <int kType>
struct Tables4 {
  __device__ static float value(int code) { return tables4::kValues[kType][code]; }
  __device__ static float boundary(int rank) { return tables4::kBoundaries[kType][rank]; }
  __device__ static unsigned code(int rank) { return tables4::kOrder[kType][rank]; }
};

// Finds the codes of scaled values in [-1, 1]: the same result as bnb::rank_4bit on the boundaries of GPUs. NaN gets
// code 0.
//
// The value is rounded to a grid of 31 cells, narrower than the distance of any two boundaries, so each cell holds at
// most one of them. Each lane of a group knows one cell: its boundary and the rank below it. A cell knows boundaries a
// little beyond its border, too, which makes the rounding at the border harmless. FP4, whose boundaries around zero are
// close to each other, has its cells by magnitude.
//
// Codes are added up as float32 numbers, each shifted to its place by a factor: the units for that are less in demand
// than those for bits.
template <int kType>
struct Encoder4 {
  static constexpr bool kByMagnitude = kType == static_cast<int>(bnb::QuantType::kFp4);
  // Adding this to a float32 leaves the rounded value, counted from kZeroCell, in the low bits of its pattern. The
  // arithmetic of NVIDIA's GPUs gives one pattern for NaN, with all of these bits set: the last lane's cell.
  static constexpr int kZeroCell = kByMagnitude ? 0 : 15;
  static constexpr float kRounder = 12582912.0f + kZeroCell;
  static constexpr float kScale = 15.0f;
#ifdef BNB_HIP
  static constexpr bool kNanHasCell = false;
#else
  static constexpr bool kNanHasCell = true;
#endif

  float boundary, rank;

  __device__ Encoder4() {
    const int lane = threadIdx.x % kLanes, cell = lane - kZeroCell;
    const float low = (cell - 0.5f) / kScale - 1e-4f, high = (cell + 0.5f) / kScale + 1e-4f;
    // By magnitude, the ranks of positive values: there are as many boundaries below them as codes.
    constexpr int kFirst = kByMagnitude ? 8 : 0;
    int below = kFirst;
    for (int k = kFirst; k < 15; ++k) {
      below += Tables4<kType>::boundary(k) < low;
    }
    const bool crossed = below < 15 && Tables4<kType>::boundary(below < 15 ? below : 14) <= high;
    const bool is_nan = lane == kLanes - 1;
    boundary = crossed && !is_nan ? Tables4<kType>::boundary(below) : 2.0f;
    rank = is_nan ? 0.0f : static_cast<float>(below - kFirst);
  }

  // 1 or 0.
  __device__ __forceinline__ static float is_above(float value, float limit) {
#ifdef BNB_HIP
    return value > limit ? 1.0f : 0.0f;
#else
    float result;
    asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(limit));
    return result;
#endif
  }

  // Four bytes of codes, the earlier value of a byte in its high nibble. All lanes of the group call this.
  __device__ __forceinline__ unsigned operator()(const Lanes<8>& scaled) const {
    unsigned halves[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Numbers from here on are whole, and their lowest bits those of the pattern.
      float sum = 8388608.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        constexpr float kPlaces[4] = {16.0f, 1.0f, 4096.0f, 256.0f};
        const float value = scaled.values[4 * h + i];
        const int cell =
            static_cast<int>(bnb::bits_of(__fmaf_rn(kByMagnitude ? fabsf(value) : value, kScale, kRounder)));
        const float above = is_above(kByMagnitude ? fabsf(value) : value, shuffle(boundary, cell));
        const float own = !kNanHasCell && value != value ? 0.0f : shuffle(rank, cell);
        sum = __fmaf_rn(above, kPlaces[i], __fmaf_rn(own, kPlaces[i], sum));
        if constexpr (kByMagnitude) {
          sum = __fmaf_rn(is_above(0.0f, value), 8.0f * kPlaces[i], sum);
        }
      }
      halves[h] = bnb::bits_of(sum);
    }
    return in_order(low_halves(halves[0], halves[1]));
  }

  // For values beyond [-1, 1], as in a block whose absmax has no finite reciprocal.
  __device__ static unsigned any(float scaled) {
    int rank = 0;
    for (int k = 0; k < 15; ++k) {
      rank += scaled > Tables4<kType>::boundary(k);
    }
    return scaled == scaled ? Tables4<kType>::code(rank) : 0u;
  }

 private:
  __device__ __forceinline__ static unsigned in_order(unsigned word) {
    return kByMagnitude ? word ^ (word & 0x22222222u) << 1 : word;
  }
  __device__ __forceinline__ static unsigned low_halves(unsigned low, unsigned high) {
    return __byte_perm(low, high, 0x5410);
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
