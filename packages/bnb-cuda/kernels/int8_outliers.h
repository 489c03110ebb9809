// How outlier columns come into the tiles of int8_gemm_groups.cu: as stages of 64 columns of 16-bit numbers, in which
// both values and codes are exact.
//
// Up to as many as the caller has memory for, warps with nothing else to do put them side by side while the integers
// are multiplied. They take rows as they get to them, and each has its rows done before it waits for anything: no
// thread block depends on one that has not begun. More columns are multiplied where they lie: the copy engine brings
// all columns of the activations and codes of the weight, and the warps that multiply first clear the columns without
// an outlier and widen the codes.
//
// Where the integers contain the outlier columns too, what is multiplied of a value is the rest that its code leaves:
// the value itself for an outlier, whose code is 0, and next to nothing for others.
#pragma once

#include "int8_gemm.h"
#include "tensor_map.h"
#include "wgmma.h"

#ifndef BNB_HIP

namespace bnb_gpu {

constexpr int kMathGroups = 2;
constexpr int kMathThreads = kMathGroups * kGroupThreads;
// Columns of a stage of outliers, whose rows have 128 bytes.
constexpr int kOutlierStep = kSwizzledRowBytes / 2;
static_assert(kGatheredMultiple % kOutlierStep == 0, "gathered columns fill stages");
// The named barrier of the warps that multiply.
constexpr int kMathBarrier = 1;

struct Problem {
  int m, n, k, room;
  int tile_tokens;  // rows of activations of a tile; more have room
  const float* a_absmax;
  const float* b_absmax;
  const void* values;
  const int8_t* token_codes;  // null if they are 0 in the outlier columns
  const int8_t* codes;
  Outliers outliers;
  void* gathered;
  const void* bias;
  int bias_dtype;
};

constexpr int kGatherWarps = kGroupThreads / kLanes - 1;
// Values of which each lane has the loads under way.
constexpr int kGatheredAtOnce = 16;

// How the rows of both matrices are handed out: in as many chunks as there are warps, if all begin at once.
struct GatherPlan {
  int rows, weight_chunks, chunks;

  __device__ __forceinline__ explicit GatherPlan(const Problem& p) {
    const int warps = static_cast<int>(gridDim.x) * kGatherWarps;
    rows = (p.n + p.m + warps - 1) / warps;
    weight_chunks = (p.n + rows - 1) / rows;
    chunks = weight_chunks + (p.m + rows - 1) / rows;
  }
};

// Writes the outlier columns of `rows` rows, up to the end of a stage. `load`: of a row and a column.
template <class T, class Load>
__device__ __forceinline__ void gather_rows(T* out, const Problem& p, int count, int rows, int lane, Load&& load) {
  constexpr int kPerVector = 16 / sizeof(T), kVectors = kOutlierStep / kPerVector;
  const int whole = count / kOutlierStep * kOutlierStep;
  for (int i = lane; count > whole && i < rows * kVectors; i += kLanes) {
    T* to = out + static_cast<int64_t>(i / kVectors) * p.room + whole + i % kVectors * kPerVector;
    *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  // A power of two of places for each row, so that no index is a quotient.
  const int shift = count > 1 ? kLanes - __clz(count - 1) : 0, mask = (1 << shift) - 1, items = rows << shift;
  for (int begin = lane; begin < items; begin += kGatheredAtOnce * kLanes) {
    T values[kGatheredAtOnce];
#pragma unroll
    for (int u = 0; u < kGatheredAtOnce; ++u) {
      const int item = min(begin + u * kLanes, items - 1);
      values[u] = load(item >> shift, p.outliers.columns[min(item & mask, count - 1)]);
    }
#pragma unroll
    for (int u = 0; u < kGatheredAtOnce; ++u) {
      const int item = begin + u * kLanes;
      if (item < items && (item & mask) < count) {
        out[static_cast<int64_t>(item >> shift) * p.room + (item & mask)] = values[u];
      }
    }
  }
}

// Puts outlier columns side by side, of the weight and of the activations, until nobody has anything left to do.
template <class T>
__device__ __forceinline__ void gather_outliers(const Problem& p, int count, int lane) {
  int* taken = p.outliers.count + 1;
  int* done = p.outliers.count + 2;
  const GatherPlan plan(p);
  const T* values = static_cast<const T*>(p.values);
  T* gathered = static_cast<T*>(p.gathered);
  while (true) {
    const int chunk = shuffle(lane == 0 ? atomicAdd(taken, 1) : 0, 0);
    if (chunk >= plan.chunks) {
      return;
    }
    const bool of_weight = chunk < plan.weight_chunks;
    const int first = (of_weight ? chunk : chunk - plan.weight_chunks) * plan.rows;
    const int rows = min(plan.rows, (of_weight ? p.n : p.m) - first);
    const auto place_of = [&](int row, int column) { return static_cast<int64_t>(first + row) * p.k + column; };
    if (of_weight) {
      gather_rows(gathered + static_cast<int64_t>(first) * p.room, p, count, rows, lane,
                  [&](int row, int column) { return from_float<T>(p.codes[place_of(row, column)]); });
    } else {
      gather_rows(gathered + static_cast<int64_t>(p.n + first) * p.room, p, count, rows, lane,
                  [&](int row, int column) {
                    const float code = p.token_codes == nullptr ? 0.0f : p.token_codes[place_of(row, column)];
                    const float scale = p.a_absmax[first + row] * (1.0f / 127.0f);
                    return from_float<T>(rest_of_code(to_float(values[place_of(row, column)]), code, scale));
                  });
    }
    publish_to_copy_engine();
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      atomicAdd(done, 1);
    }
  }
}

// Until all outlier columns lie side by side, for the copy engine to see.
__device__ __forceinline__ void wait_for_gathered(const Problem& p) {
  const int chunks = GatherPlan(p).chunks;
  while (load_acquiring(p.outliers.count + 2) < chunks) {
  }
  publish_to_copy_engine();
}

// A thread's share in making operands of the stages of a tile. The copy engine brings values of the activations as the
// matrix units want them, and codes of the weight in rows of 64 bytes to where they shall stand widened.
template <class T, int kTokens, int kRows>
class MaskedStages {
 public:
  // `first_token`: of the tile; `absmax`: of its rows of activations, in shared memory. `used`: or there are no such
  // stages.
  __device__ __forceinline__ MaskedStages(const Problem& p, int first_token, const float* absmax, bool used)
      : p_(p), first_token_(first_token), absmax_(absmax) {
    if (used) {
      fetch(0);
    }
  }

  // All threads that multiply call this for stage `step`, which has arrived.
  __device__ __forceinline__ void make_operands(unsigned char* stage, int step) {
    unsigned char* weight = stage + kTokens * kSwizzledRowBytes;
    uint4 arrived[kWeightPieces];
#pragma unroll
    for (int i = 0; i < kWeightPieces; ++i) {
      arrived[i] = *reinterpret_cast<const uint4*>(weight + 16 * (i * kMathThreads + threadIdx.x));
    }
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int row = row_of(i);
      uint4* piece = reinterpret_cast<uint4*>(stage + place(row, threadIdx.x % kPieces));
      *piece = rest_of(*piece, codes_[i], absmax_[row] * (1.0f / 127.0f));
    }
    fetch(step + 1);
    synchronize_some(kMathBarrier, kMathThreads);
#pragma unroll
    for (int i = 0; i < kWeightPieces; ++i) {
      const int item = i * kMathThreads + threadIdx.x, row = item / (kPieces / 2), first = item % (kPieces / 2) * 2;
      const uint4 codes = arrived[i];
      *reinterpret_cast<uint4*>(weight + place(row, first)) = widened(codes.x, codes.y);
      *reinterpret_cast<uint4*>(weight + place(row, first + 1)) = widened(codes.z, codes.w);
    }
    publish_to_matrix_units();
    synchronize_some(kMathBarrier, kMathThreads);
  }

 private:
  static constexpr int kPieces = kSwizzledRowBytes / 16;
  static constexpr int kTokenPieces = kTokens * kPieces / kMathThreads;
  static constexpr int kWeightPieces = kRows * kPieces / 2 / kMathThreads;

  // Place of a 16-byte piece of a row.
  static __device__ __forceinline__ int place(int row, int piece) {
    return row * kSwizzledRowBytes + (piece ^ (row % kPieces)) * 16;
  }

  static __device__ __forceinline__ int row_of(int i) { return i * (kMathThreads / kPieces) + threadIdx.x / kPieces; }

  // Masks and codes of this thread's eight columns of a stage, ahead of their use.
  __device__ __forceinline__ void fetch(int step) {
    const int column = step * kOutlierStep + threadIdx.x % kPieces * 8;
    const unsigned flags = flags_of<8>(p_.outliers.flags, column, p_.k);
    mask_ = make_uint4(pair_mask(flags), pair_mask(flags >> 2), pair_mask(flags >> 4), pair_mask(flags >> 6));
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      codes_[i] = make_uint2(0, 0);
      if (p_.token_codes != nullptr && flags != 0) {
        const int64_t row = min(first_token_ + row_of(i), p_.m - 1);
        codes_[i] = *reinterpret_cast<const uint2*>(p_.token_codes + row * p_.k + column);
      }
    }
  }

  // What the codes leave of eight values, 0 in columns without an outlier.
  __device__ __forceinline__ uint4 rest_of(uint4 values, uint2 codes, float scale) const {
    return make_uint4(rest_of_codes<T, 0>(values.x, codes.x, scale) & mask_.x,
                      rest_of_codes<T, 1>(values.y, codes.x, scale) & mask_.y,
                      rest_of_codes<T, 0>(values.z, codes.y, scale) & mask_.z,
                      rest_of_codes<T, 1>(values.w, codes.y, scale) & mask_.w);
  }

  static __device__ __forceinline__ uint4 widened(unsigned first, unsigned second) {
    return make_uint4(widen_codes<T, 0>(first), widen_codes<T, 1>(first), widen_codes<T, 0>(second),
                      widen_codes<T, 1>(second));
  }

  const Problem& p_;
  const int first_token_;
  const float* absmax_;
  uint2 codes_[kTokenPieces];
  uint4 mask_;
};

}  // namespace bnb_gpu
#endif
