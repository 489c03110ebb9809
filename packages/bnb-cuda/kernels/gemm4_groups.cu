// Products of a 4-bit weight with 17 and more rows of activations on compute capability 9.0.
//
// A thread block computes 128 rows of the weight times 32 or 64 rows of activations with four groups of
// four warps: two share the rows, two take chunks of 64 columns in turn. Codes and activations pass
// through a ring in shared memory. A group decodes one chunk into registers, the left operand of the
// matrix units, while these multiply the chunk before; the right operand stays in shared memory. Sums
// over a block of the weight are scaled in float32. Where a grid of such tiles would leave
// multiprocessors idle, the thread blocks of a cluster split the columns.
#include <type_traits>

#include "gemm4.h"
#include "wgmma.h"

#ifndef BNB_HIP
#include <cooperative_groups.h>
#endif

namespace bnb_gpu {
namespace {

constexpr int kRowGroups = 2;
constexpr int kDepthGroups = 2;
constexpr int kGroupThreads = 4 * kLanes;
constexpr int kThreads = kRowGroups * kDepthGroups * kGroupThreads;
constexpr int kRows = 64 * kRowGroups;
constexpr int kChunk = 64;
constexpr int kStep = kDepthGroups * kChunk;  // columns per step of the thread block
constexpr int kStages = 6;
// Steps between a copy and its use: one less than the ring allows, as a stage that is read is still in
// use during the next step.
constexpr int kAhead = kStages - 2;
// The padding of 16 bytes puts the words of eight rows into different banks.
constexpr int kCodePitch = kStep / 2 + 16;
constexpr int kCodeStage = kRows * kCodePitch;
constexpr int kSumPitch = kRows + 4;

template <int kTokens>
struct SharedLayout {
  static constexpr int kTile = kTokens * kSwizzledRowBytes;  // activations of one chunk
  static constexpr int kCodes = kStages * kDepthGroups * kTile;
  static constexpr int kTable = kCodes + kStages * kCodeStage;
  static constexpr int kNestedCode = kTable + kPairTableBytes;
  static constexpr int kBytes = kNestedCode + 256 * 4;
  static_assert(kTokens * kSumPitch * 4 <= kCodes, "the sums take the place of the activations");
};

template <class T, int kType, bool kNested, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_groups(const T* __restrict__ a, int m, int n, int k, const uint8_t* __restrict__ packed,
                 const Statistics statistics, int block_shift, int nested_shift, const void* __restrict__ bias,
                 int bias_dtype, T* __restrict__ out) {
#if BNB_WGMMA
  using Layout = SharedLayout<kTokens>;
  using Scale = BlockScale<kNested, true>;
  constexpr int kSums = kTokens / 2;
  extern __shared__ __align__(1024) unsigned char shared[];
  const unsigned char* table = shared + Layout::kTable;

  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kGroupThreads;
  const int row_group = group % kRowGroups, depth_group = group / kRowGroups;
  const int g = lane / 4, t = lane % 4;
  const unsigned lane_offset = 4 * lane;
  const int splits = gridDim.x, split = blockIdx.x;
  const int first_row = blockIdx.y * kRows, first_token = blockIdx.z * kTokens;
  const int steps_total = (k + kStep - 1) / kStep;
  const int begin = static_cast<int>(static_cast<int64_t>(steps_total) * split / splits);
  const int end = static_cast<int>(static_cast<int64_t>(steps_total) * (split + 1) / splits);

  // Beyond the end, zeros: the loop takes an even number of steps.
  const auto stage = [&](int step) {
    const int slot = (step - begin) % kStages;
    unsigned char* activations = shared + slot * kDepthGroups * Layout::kTile;
    constexpr int kPieces = kStep / 8;  // of 16 bytes in a row of activations
#pragma unroll
    for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
      const int token = i / kPieces, piece = i % kPieces, column = step * kStep + piece * 8;
      const bool valid = first_token + token < m && column < k && step < end;
      const T* from = valid ? a + static_cast<int64_t>(first_token + token) * k + column : a;
      copy_async(activations + piece / 8 * Layout::kTile + swizzled(token, piece % 8), from, valid);
    }
    constexpr int kCodePieces = kStep / 32;
    static_assert(kRows * kCodePieces == kThreads, "one piece of codes per thread");
    const int row = threadIdx.x / kCodePieces, piece = threadIdx.x % kCodePieces;
    const int column = step * kStep + piece * 32;
    const bool valid = column < k && step < end;
    const int64_t element = static_cast<int64_t>(min(first_row + row, n - 1)) * k + column;
    copy_async(shared + Layout::kCodes + slot * kCodeStage + row * kCodePitch + piece * 16,
               valid ? packed + element / 2 : packed, valid);
    commit_copies();
  };

#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    stage(begin + s);
  }

  const Scale scale_of(statistics, reinterpret_cast<float*>(shared + Layout::kNestedCode), nested_shift);
  const int own_row = row_group * 64 + threadIdx.x % kGroupThreads / kLanes * 16 + g;
  int64_t row_begin[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    row_begin[h] = static_cast<int64_t>(min(first_row + own_row + 8 * h, n - 1)) * k;
  }
  typename Scale::Stored scales[2][2];
  const auto fetch_scales = [&](int slot, int step) {
    const int column = step * kStep + depth_group * kChunk;
    const bool valid = step < end && column < k;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales[slot][h] = scale_of.fetch((row_begin[h] + (valid ? column : 0)) >> block_shift);
      scales[slot][h].absmax = valid ? scales[slot][h].absmax : 0.0f;
    }
  };
  fetch_scales(0, begin);
  fetch_scales(1, begin + 1);
  build_pair_table<T, kType>(reinterpret_cast<unsigned*>(shared + Layout::kTable));

  float sums[kSums] = {};
  float block[kSums];
  // Adds the products of a step, once the matrix units are through with it.
  const auto add_block = [&](int slot, int next_step) {
    wait_for_products(block);
    const float upper = scale_of.value(scales[slot][0]), lower = scale_of.value(scales[slot][1]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = __fmaf_rn(block[i], i % 4 < 2 ? upper : lower, sums[i]);
    }
    fetch_scales(slot, next_step);
  };

  // With 64 tokens, registers for the next operand are short: other groups fill the matrix units then.
  constexpr bool kOverlaps = kTokens <= 32;
  unsigned left[kOverlaps ? 2 : 1][kChunk / 16][4];
  const auto enter = [&](int step) {
    wait_for_copies<kAhead - 1>();
    publish_to_matrix_units();
    __syncthreads();
    stage(step + kAhead);
  };
  const auto decode = [&](int d, int step) {
    const unsigned char* codes = shared + Layout::kCodes + (step - begin) % kStages * kCodeStage +
                                 own_row * kCodePitch + depth_group * (kChunk / 2) + t;
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Rows g and g + 8; columns 2 t and 2 t + 8 of a product: byte t of a word each.
        const unsigned byte = codes[(j % 2) * 8 * kCodePitch + (2 * i + j / 2) * 4];
        left[kOverlaps ? d : 0][i][j] = *reinterpret_cast<const unsigned*>(table + (byte << 7 | lane_offset));
      }
    }
  };
  const auto multiply = [&](int d, int step) {
    const int tile = (step - begin) % kStages * kDepthGroups + depth_group;
    const uint64_t right = tile_descriptor(shared + tile * Layout::kTile);
    begin_products();
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) {
      multiply_group<T>(block, left[kOverlaps ? d : 0][i], right + 2 * i, i > 0);
    }
    commit_products();
  };

  // A step, and the sums of the one before it.
  const auto take = [&](int d, int step) {
    enter(step);
    if (!kOverlaps) {
      add_block(1 - d, step + 1);
    }
    decode(d, step);
    if (kOverlaps) {
      add_block(1 - d, step + 1);
    }
    multiply(d, step);
  };

  const int last = begin + max(2, (end - begin + 1) / 2 * 2) - 1;
  enter(begin);
  decode(0, begin);
  multiply(0, begin);
  for (int step = begin + 1; step < last; step += 2) {
    take(1, step);
    take(0, step + 1);
  }
  take(1, last);
  add_block(1, end);

  // Sum over the two halves of the block, then over the cluster, in shared memory: token by row.
  wait_for_copies<0>();
  __syncthreads();
  float* total = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int half = 0; half < kDepthGroups; ++half) {
    if (depth_group == half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int row = own_row + 8 * (i % 4 / 2), token = 8 * (i / 4) + 2 * t + i % 2;
        float& cell = total[token * kSumPitch + row];
        cell = half == 0 ? sums[i] : cell + sums[i];
      }
    }
    __syncthreads();
  }
  auto cluster = cooperative_groups::this_cluster();
  if (splits > 1) {
    cluster.sync();
  }
  // Each thread block of a cluster finishes its share of the tile.
  constexpr int kCells = kTokens * kRows;
  const int share = (kCells / splits + kThreads - 1) / kThreads * kThreads;
  const int stop = min(kCells, (split + 1) * share);
  for (int i = split * share + threadIdx.x; i < stop; i += kThreads) {
    const int token = i / kRows, row = i % kRows;
    float sum = 0.0f;
    if (splits == 1) {
      sum = total[token * kSumPitch + row];
    } else {
      for (int s = 0; s < splits; ++s) {
        sum += cluster.map_shared_rank(total, s)[token * kSumPitch + row];
      }
    }
    if (first_row + row < n && first_token + token < m) {
      out[static_cast<int64_t>(first_token + token) * n + first_row + row] =
          from_float<T>(sum + load_bias(bias, bias_dtype, first_row + row));
    }
  }
  if (splits > 1) {
    cluster.sync();
  }
#endif
}

template <class T, int kType, bool kNested, int kTokens>
void run(const Launch& launch, const Gemm4& p, int split) {
#ifndef BNB_HIP
  const auto kernel = gemm4_groups<T, kType, kNested, kTokens>;
  constexpr int kShared = SharedLayout<kTokens>::kBytes;
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), kShared);
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(split, static_cast<unsigned>(ceil_div(p.n, kRows)), static_cast<unsigned>(ceil_div(p.m, kTokens)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = launch.stream();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = split;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = split > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<const T*>(p.a), static_cast<int>(p.m), static_cast<int>(p.n),
                           static_cast<int>(p.k), p.packed, p.statistics, exact_log2(p.blocksize),
                           exact_log2(p.statistics.nested_blocksize), p.bias, p.bias_dtype, static_cast<T*>(p.out)),
        "gemm_4bit");
#endif
}

}  // namespace

void gemm_4bit_groups(const Launch& launch, const Gemm4& p, int split) {
  with_half_dtype(p.dtype, [&](auto type) {
    with_quant_type(p.quant_type, [&](auto quant) {
      with_nested(p.statistics, [&](auto nested) {
        using T = typename decltype(type)::type;
        constexpr int kType = decltype(quant)::value;
        constexpr bool kNested = decltype(nested)::value;
        p.m <= 32 ? run<T, kType, kNested, 32>(launch, p, split) : run<T, kType, kNested, 64>(launch, p, split);
      });
    });
  });
  check_launch("gemm_4bit");
}

}  // namespace bnb_gpu
