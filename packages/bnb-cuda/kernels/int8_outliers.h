// How outlier columns come into the tiles of int8_gemm_groups.cu.
//
// A few are gathered, in batches of 16, by warps beside those that multiply. Many, which would be gathered one load at
// a time, are multiplied where they lie: the copy engine brings all columns of the activations and codes of the weight,
// 64 per stage, and the warps that multiply them first clear the others and make the codes 16-bit numbers.
//
// Where the integers contain the outlier columns too, what is multiplied of a value is the rest that its code leaves:
// the value itself for an outlier, whose code is 0, and next to nothing for others.
#pragma once

#include "int8_gemm.h"
#include "wgmma.h"

#ifndef BNB_HIP

namespace bnb_gpu {

constexpr int kBatch = 16;               // outlier columns of one product
constexpr int kBatchPitch = 2 * kBatch;  // bytes of a row of a batch
constexpr int kMathGroups = 2;
constexpr int kMathThreads = kMathGroups * kGroupThreads;
constexpr int kGatherThreads = kGroupThreads - kLanes;

struct Problem {
  int m, n, k;
  const float* a_absmax;
  const float* b_absmax;
  const void* values;
  const int8_t* token_codes;  // null if they are 0 in the outlier columns
  const int8_t* codes;
  Outliers outliers;
  const void* bias;
  int bias_dtype;
};

// Offset in bytes of a pair of values in a batch: 16-byte halves of rows swapped so that eight rows use all banks.
__device__ __forceinline__ int batch_offset(int row, int pair) {
  return row * kBatchPitch + ((pair / 4) ^ ((row >> 2) & 1)) * 16 + pair % 4 * 4;
}

// Gathers `kAtOnce` times a pair of outlier columns in rows of one of the matrices; the loads of all of them are under
// way before the first is needed. `pair_at` loads: of a row and two columns.
template <int kRows, int kAtOnce, class PairAt>
__device__ __forceinline__ void gather_rows(unsigned char* batch, int first_row, int rows, int own_column, int columns,
                                            int thread, PairAt&& pair_at) {
  const int pairs = (columns + 1) / 2, items = kRows * pairs;
  // As often in all lanes, which tell each other the columns.
  for (int begin = 0; begin < items; begin += kAtOnce * kGatherThreads) {
    decltype(pair_at(0, 0, 0)) loaded[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int item = min(begin + u * kGatherThreads + thread, items - 1), pair = item % pairs;
      const int left = shuffle(own_column, 2 * pair), right = shuffle(own_column, min(2 * pair + 1, columns - 1));
      loaded[u] = pair_at(min(item / pairs, rows - 1), left, right);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int item = begin + u * kGatherThreads + thread;
      if (item < items) {
        const int row = item / pairs, pair = item % pairs;
        const unsigned both = row < rows ? loaded[u].pack() : 0u;
        *reinterpret_cast<unsigned*>(batch + batch_offset(first_row + row, pair)) =
            2 * pair + 1 < columns ? both : both & 0xffffu;
      }
    }
  }
}

// Two values of a row of activations with what their codes stand for, and two codes of a row of the weight.
template <class T, bool kCoded>
struct ValuePair {
  T values[2];
  int8_t codes[2];
  float absmax;

  __device__ __forceinline__ unsigned pack() const {
    const float scale = absmax * (1.0f / 127.0f);
    return kCoded ? pack_pair<T>(to_float(values[0]) - codes[0] * scale, to_float(values[1]) - codes[1] * scale)
                  : pack_pair<T>(to_float(values[0]), to_float(values[1]));
  }
};

template <class T>
struct CodePair {
  int8_t codes[2];

  __device__ __forceinline__ unsigned pack() const { return pack_pair<T>(codes[0], codes[1]); }
};

// Gathers one batch of outlier columns: rows of the activations, then of the weight's codes; zeros beyond the end.
template <class T, int kTokens, int kRows>
__device__ __forceinline__ void gather(unsigned char* batch, const Problem& p, int first_token, int first_row,
                                       int first, int count, int thread) {
  const int columns = min(kBatch, count - first), lane = thread % kLanes;
  const int own_column = lane < columns ? p.outliers.columns[first + lane] : 0;
  // Pairs of columns that the batch does not have.
  const int pairs = (columns + 1) / 2, absent = kBatch / 2 - pairs;
  for (int i = thread; i < (kTokens + kRows) * absent; i += kGatherThreads) {
    *reinterpret_cast<unsigned*>(batch + batch_offset(i / absent, pairs + i % absent)) = 0u;
  }
  const T* values = static_cast<const T*>(p.values) + static_cast<int64_t>(first_token) * p.k;
  const int8_t* token_codes = p.token_codes + static_cast<int64_t>(first_token) * p.k;
  const int tokens = min(kTokens, p.m - first_token);
  if (p.token_codes != nullptr) {
    gather_rows<kTokens, 2>(batch, 0, tokens, own_column, columns, thread, [&](int row, int left, int right) {
      const int64_t from = static_cast<int64_t>(row) * p.k;
      return ValuePair<T, true>{{values[from + left], values[from + right]},
                                {token_codes[from + left], token_codes[from + right]},
                                p.a_absmax[first_token + row]};
    });
  } else {
    gather_rows<kTokens, 2>(batch, 0, tokens, own_column, columns, thread, [&](int row, int left, int right) {
      const int64_t from = static_cast<int64_t>(row) * p.k;
      return ValuePair<T, false>{{values[from + left], values[from + right]}, {}, 0.0f};
    });
  }
  const int8_t* codes = p.codes + static_cast<int64_t>(first_row) * p.k;
  gather_rows<kRows, 4>(batch, kTokens, min(kRows, p.n - first_row), own_column, columns, thread,
                        [&](int row, int left, int right) {
                          const int64_t from = static_cast<int64_t>(row) * p.k;
                          return CodePair<T>{{codes[from + left], codes[from + right]}};
                        });
}

// Columns of a stage where many are multiplied in place; values and widened codes fill rows of 128 bytes.
constexpr int kMaskedStep = kSwizzledRowBytes / 2;
// The named barrier of the warps that multiply.
constexpr int kMathBarrier = 1;

// Whether outlier columns are multiplied in place rather than gathered.
__device__ __forceinline__ bool are_masked(const Problem& p, int count) {
  return are_many(p.outliers, count, p.k, kGatheredShare);
}

// A thread's share in making operands of the stages of a tile. The copy engine brings values of the activations as the
// matrix units want them, and codes of the weight in rows of 64 bytes to where they shall stand widened.
template <class T, int kTokens, int kRows>
class MaskedStages {
 public:
  // `first_token`: of the tile; `absmax`: of its rows of activations, in shared memory.
  __device__ __forceinline__ MaskedStages(const Problem& p, int first_token, const float* absmax)
      : p_(p), first_token_(first_token), absmax_(absmax) {
    fetch(0);
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
    const int column = step * kMaskedStep + threadIdx.x % kPieces * 8;
    const unsigned flags = column < p_.k ? p_.outliers.flags[column / 32] >> (column % 32) & 0xffu : 0u;
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
    return make_uint4(rest_of<0>(values.x, codes.x, scale) & mask_.x, rest_of<1>(values.y, codes.x, scale) & mask_.y,
                      rest_of<0>(values.z, codes.y, scale) & mask_.z, rest_of<1>(values.w, codes.y, scale) & mask_.w);
  }

  template <int kHalf>
  static __device__ __forceinline__ unsigned rest_of(unsigned values, unsigned codes, float scale) {
    const float2 pair = unpack_pair<T>(values);
    return pack_pair<T>(__fmaf_rn(-code_value<2 * kHalf>(codes), scale, pair.x),
                        __fmaf_rn(-code_value<2 * kHalf + 1>(codes), scale, pair.y));
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
