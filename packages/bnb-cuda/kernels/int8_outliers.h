// How outlier columns come into the tiles of int8_gemm_groups.cu: as stages of 64 columns of 16-bit numbers, in which
// both values and codes are exact.
//
// Up to as many as the caller has memory for are put side by side there while the integers are multiplied. Codes of the
// weight are picked out of the stages that are in shared memory for that, since memory would bring 64 bytes for each.
// Thread blocks with the same rows of the weight all pick them, and write the same. Values are gathered by warps that
// take rows as they get to them, and each has its rows done before it waits for anything: no thread block depends on
// one that has not begun.
//
// Which columns those are, quantization has listed, or it has left the flags of few rows to each thread block: then the
// warps that multiply merge them before they begin, and a picker lists them while they do.
//
// More columns are multiplied where they lie: the copy engine brings all columns of the activations and codes of the
// weight, and the warps that multiply first clear the columns without an outlier and widen the codes.
//
// Where the integers contain the outlier columns too, what is multiplied of a value is the rest that its code leaves:
// the value itself for an outlier, whose code is 0, and next to nothing for others.
#pragma once

#include "int8_flags.h"
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
  const uint8_t* row_flags;  // that nobody has merged, or null
  void* gathered;
  const void* bias;
  int bias_dtype;
};

// Outlier columns as the warps of a thread block see them: in global memory, or in shared memory where they have merged
// the flags of rows themselves. With more than have room the list ends there, and the flags count.
struct SeenOutliers {
  const int* columns;
  const unsigned* flags;
  int count;

  __device__ __forceinline__ bool masked(const Problem& p) const { return count > p.room; }
  __device__ __forceinline__ int gathered(const Problem& p) const { return masked(p) ? 0 : count; }
  // Stages of outlier columns that a tile has.
  __device__ __forceinline__ int steps(const Problem& p) const {
    return ((masked(p) ? p.k : count) + kOutlierStep - 1) / kOutlierStep;
  }
};

// Values of which each lane has the loads under way.
constexpr int kGatheredAtOnce = 8;

// How the rows of the activations are handed out: in as many chunks as there are thread blocks, if all begin at once.
struct GatherPlan {
  int rows, chunks;

  __device__ __forceinline__ explicit GatherPlan(const Problem& p) {
    const int blocks = static_cast<int>(gridDim.x);
    rows = (p.m + blocks - 1) / blocks;
    chunks = (p.m + rows - 1) / rows;
  }
};

// Writes the outlier columns of `rows` rows of the activations, up to the end of a stage, behind those of the weight.
template <class T>
__device__ __forceinline__ void gather_rows(const Problem& p, const SeenOutliers& seen, int first, int rows, int lane) {
  const int count = seen.count;
  constexpr int kPerVector = 16 / sizeof(T), kVectors = kOutlierStep / kPerVector;
  T* out = static_cast<T*>(p.gathered) + static_cast<int64_t>(p.n + first) * p.room;
  const int whole = count / kOutlierStep * kOutlierStep;
  for (int i = lane; count > whole && i < rows * kVectors; i += kLanes) {
    T* to = out + static_cast<int64_t>(i / kVectors) * p.room + whole + i % kVectors * kPerVector;
    *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  // A power of two of places for each row, so that no index is a quotient.
  const int shift = count > 1 ? kLanes - __clz(count - 1) : 0, mask = (1 << shift) - 1, items = rows << shift;
  for (int begin = lane; begin < items; begin += kGatheredAtOnce * kLanes) {
    T rests[kGatheredAtOnce];
#pragma unroll
    for (int u = 0; u < kGatheredAtOnce; ++u) {
      const int item = min(begin + u * kLanes, items - 1), row = first + (item >> shift);
      const int64_t place = static_cast<int64_t>(row) * p.k + seen.columns[min(item & mask, count - 1)];
      const float code = p.token_codes == nullptr ? 0.0f : p.token_codes[place];
      const float value = to_float(static_cast<const T*>(p.values)[place]);
      rests[u] = from_float<T>(rest_of_code(value, code, p.a_absmax[row] * (1.0f / 127.0f)));
    }
#pragma unroll
    for (int u = 0; u < kGatheredAtOnce; ++u) {
      const int item = begin + u * kLanes;
      if (item < items && (item & mask) < count) {
        out[static_cast<int64_t>(item >> shift) * p.room + (item & mask)] = rests[u];
      }
    }
  }
}

// Puts outlier columns of the activations side by side, until nobody has anything left to do.
template <class T>
__device__ __forceinline__ void gather_outliers(const Problem& p, const SeenOutliers& seen, int lane) {
  int* taken = p.outliers.count + 1;
  int* done = p.outliers.count + 2;
  const GatherPlan plan(p);
  while (true) {
    const int chunk = shuffle(lane == 0 ? atomicAdd(taken, 1) : 0, 0);
    if (chunk >= plan.chunks) {
      return;
    }
    const int first = chunk * plan.rows;
    gather_rows<T>(p, seen, first, min(plan.rows, p.m - first), lane);
    publish_to_copy_engine();
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      atomicAdd(done, 1);
    }
  }
}

// Until all outlier columns of the activations lie side by side, for the copy engine to see.
__device__ __forceinline__ void wait_for_gathered(const Problem& p) {
  const int chunks = GatherPlan(p).chunks;
  while (load_acquiring(p.outliers.count + 2) < chunks) {
  }
  publish_to_copy_engine();
}

constexpr int kPickers = 2;  // warps, which share the rows of a tile

// Picks the outlier columns of rows of the weight out of the stages of a tile that pass by. A warp does. It puts them
// side by side in shared memory, as a panel that the copy engine writes when it is full.
//
// A lane takes every fourth column of the list, by itself, in one of eight rows, and then in those rows below them for
// which the swizzle is the same.
template <class T, int kRows>
class CodePicker {
 public:
  // `columns`: the list of so many. `panel`: room for so many rows of a stage. `map`: describes the columns side by
  // side, a panel at a time.
  __device__ __forceinline__ CodePicker(const int* columns, int count, const CUtensorMap& map, int first_row,
                                        unsigned char* panel, int lane)
      : columns_(columns),
        count_(count),
        map_(map),
        first_row_(first_row),
        panel_(panel),
        lane_(lane),
        place_(lane % kColumnsAtOnce),
        column_(column_at(place_)),
        next_column_(column_at(place_ + kColumnsAtOnce)) {
    begin_panel();
  }

  // `codes`: columns of these rows up to `end`, as the copy engine brings them.
  __device__ __forceinline__ void pick(const unsigned char* codes, int end) {
    while (true) {
      while (column_ < end && place_ < panel_end_) {
        move(codes);
        place_ += kColumnsAtOnce;
        column_ = next_column_;
        next_column_ = column_at(place_ + kColumnsAtOnce);
      }
      if (group_any(place_ < panel_end_)) {
        return;
      }
      write_panel();
      panel_end_ += kOutlierStep;
      begin_panel();
    }
  }

  // After the last stage: when the caller goes on, the copy engine can bring what it has written.
  __device__ __forceinline__ void finish() {
    if (count_ > panel_end_ - kOutlierStep) {
      write_panel();
    }
    if (lane_ == 0) {
      wait_for_writes();
    }
    publish_to_copy_engine();
    __syncwarp();
  }

 private:
  static constexpr int kRowsAtOnce = kSwizzleTile / kSwizzledRowBytes;
  static constexpr int kColumnsAtOnce = kLanes / kRowsAtOnce;

  // Of the list, which is in ascending order; what follows is beyond all stages.
  __device__ __forceinline__ int column_at(int place) const { return place < count_ ? columns_[place] : 0x7fffffff; }

  // Columns of the last panel of which there is no outlier get 0.
  __device__ __forceinline__ void begin_panel() {
    const int held = count_ - (panel_end_ - kOutlierStep);
    if (held > 0 && held < kOutlierStep) {
      for (int i = lane_; i < kRows * kSwizzledRowBytes / 16; i += kLanes) {
        reinterpret_cast<uint4*>(panel_)[i] = make_uint4(0, 0, 0, 0);
      }
    }
    __syncwarp();
  }

  // Moves this lane's column to its place of the panel.
  __device__ __forceinline__ void move(const unsigned char* codes) {
    const int row = lane_ / kColumnsAtOnce;
    const unsigned column = static_cast<unsigned>(column_) % kSwizzledRowBytes;
    const unsigned place = static_cast<unsigned>(place_) % kOutlierStep * static_cast<unsigned>(sizeof(T));
    const unsigned char* from = codes + swizzled_place(row, column);
    unsigned char* to = panel_ + swizzled_place(row, place);
    int8_t moved[kRows / kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      moved[i] = *reinterpret_cast<const int8_t*>(from + i * kSwizzleTile);
    }
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      *reinterpret_cast<T*>(to + i * kSwizzleTile) = from_float<T>(moved[i]);
    }
  }

  __device__ __forceinline__ void write_panel() {
    publish_to_matrix_units();
    __syncwarp();
    if (lane_ == 0) {
      write_box(map_, panel_end_ - kOutlierStep, first_row_, panel_);
      wait_for_reads_of_writes();
    }
    __syncwarp();
  }

  const int* const columns_;
  const int count_;
  const CUtensorMap& map_;
  const int first_row_;
  unsigned char* const panel_;
  const int lane_;
  int panel_end_ = kOutlierStep;
  int place_, column_, next_column_;
};

// A thread's share in making operands of the stages of a tile. The copy engine brings values of the activations as the
// matrix units want them, and codes of the weight in rows of 64 bytes to where they shall stand widened.
template <class T, int kTokens, int kRows>
class MaskedStages {
 public:
  // `flags`: of columns. `first_token`: of the tile; `absmax`: of its rows of activations, in shared memory. `used`: or
  // there are no such stages.
  __device__ __forceinline__ MaskedStages(const Problem& p, const unsigned* flags, int first_token, const float* absmax,
                                          bool used)
      : p_(p), flags_(flags), first_token_(first_token), absmax_(absmax) {
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
  static __device__ __forceinline__ int place(int row, int piece) { return swizzled_place(row, piece * 16); }

  static __device__ __forceinline__ int row_of(int i) { return i * (kMathThreads / kPieces) + threadIdx.x / kPieces; }

  // Masks and codes of this thread's eight columns of a stage, ahead of their use.
  __device__ __forceinline__ void fetch(int step) {
    const int column = step * kOutlierStep + threadIdx.x % kPieces * 8;
    const unsigned flags = flags_of<8>(flags_, column, p_.k);
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
  const unsigned* const flags_;
  const int first_token_;
  const float* absmax_;
  uint2 codes_[kTokenPieces];
  uint4 mask_;
};

}  // namespace bnb_gpu
#endif
