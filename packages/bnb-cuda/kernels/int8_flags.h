// Flags of outlier columns, a bit for each: those of every row, merged, and turned into an ascending list.
#pragma once

#include "block.h"
#include "gemm4.h"
#include "kernels.h"

namespace bnb_gpu {

// Rows of whose flags a thread has the loads under way.
constexpr int kMergedAtOnce = 8;
// Columns for which a thread block has shared memory and registers.
constexpr int kMostColumns = 16384;

// Words of the flags of so many columns, and one that counts.
inline int64_t column_words(int64_t columns) { return ceil_div(columns, 32) + 1; }

// Flags of a row: vectors, and their bytes.
constexpr int kFlagVector = 16;
__host__ __device__ constexpr int64_t flag_vectors(int64_t columns) { return (columns + 127) / 128; }
__host__ __device__ constexpr int64_t row_flag_bytes(int64_t columns) { return flag_vectors(columns) * kFlagVector; }

// Where the flags of the rows begin, behind those of the columns and the word that counts.
inline uint8_t* row_flags(const Outliers& outliers, int64_t columns) {
  const auto end = reinterpret_cast<uintptr_t>(outliers.flags + column_words(columns));
  return reinterpret_cast<uint8_t*>(ceil_div(end, uintptr_t{kFlagVector}) * kFlagVector);
}

// Flags of merged rows in shared memory: words, whole vectors of them, which begin at 0.
constexpr int kMergedWords = kMostColumns / 32;
template <int kThreads>
__device__ __forceinline__ void clear_merged(unsigned* merged, int columns) {
  for (int i = threadIdx.x; i < static_cast<int>(flag_vectors(columns)) * 4; i += kThreads) {
    merged[i] = 0;
  }
}

// Merges the flags of rows. `kThreads` threads share these, of which `thread` is one, and meet before they read any.
template <int kThreads>
__device__ __forceinline__ void merge_rows(unsigned* merged, const uint8_t* own_flags, int rows, int columns,
                                           int thread) {
  static_assert(kThreads * 128 >= kMostColumns, "a thread has one vector of each of its rows");
  const int vectors = static_cast<int>(flag_vectors(columns)), shares = kThreads / vectors;
  const int own = thread % vectors, share = thread / vectors;
  const uint4* from = reinterpret_cast<const uint4*>(own_flags) + own;
  uint4 flags = make_uint4(0, 0, 0, 0);
  for (int first = share; share < shares && first < rows; first += kMergedAtOnce * shares) {
    uint4 of_rows[kMergedAtOnce];
#pragma unroll
    for (int u = 0; u < kMergedAtOnce; ++u) {
      // Rows that do not exist stand for the last one.
      of_rows[u] = from[static_cast<int64_t>(min(first + u * shares, rows - 1)) * vectors];
    }
#pragma unroll
    for (const uint4& row : of_rows) {
      flags = make_uint4(flags.x | row.x, flags.y | row.y, flags.z | row.z, flags.w | row.w);
    }
  }
  const unsigned words[4] = {flags.x, flags.y, flags.z, flags.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (words[i] != 0) {
      atomicOr(merged + own * 4 + i, words[i]);
    }
  }
}

// The sum of a warp's values up to and with this lane's.
__device__ __forceinline__ int sum_up_to_lane(int value, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step <<= 1) {
    const int other = shuffle(value, max(lane - step, 0));
    value += lane >= step ? other : 0;
  }
  return value;
}

// Lists the first `room` of the columns that have a flag, and returns how many have one. A warp calls this.
__device__ __forceinline__ int list_flagged(const unsigned* flags, int columns, int room, int* list) {
  const int lane = threadIdx.x % kLanes, words = (columns + 31) / 32, own_words = (words + kLanes - 1) / kLanes;
  const int first = min(lane * own_words, words), end = min(first + own_words, words);
  int own = 0;
  for (int i = first; i < end; ++i) {
    own += __popc(flags[i]);
  }
  const int up_to_own = sum_up_to_lane(own, lane), stop = min(up_to_own, room);
  int place = up_to_own - own;
  for (int i = first; i < end && place < stop; ++i) {
    for (unsigned bits = flags[i]; bits != 0 && place < stop; bits &= bits - 1) {
      list[place++] = i * 32 + __ffs(static_cast<int>(bits)) - 1;
    }
  }
  return shuffle(up_to_own, kLanes - 1);
}

}  // namespace bnb_gpu
