// Products of a 4-bit weight with more rows of activations than gemm4_few takes.
//
// A thread block computes 128 rows of the weight times up to 64 rows of activations. Four warps share
// the weight rows, two halves of the block take k in turn; activations pass through a ring in shared
// memory, codes go from global memory into registers a few steps ahead. Where a grid of such tiles would
// leave multiprocessors idle, the thread blocks of a cluster split k and add up through each other's
// shared memory.
#include <type_traits>

#include "copies.h"
#include "dependent.h"
#include "gemm4.h"

#ifndef BNB_HIP
#include <cooperative_groups.h>
#endif

namespace bnb_gpu {
namespace {

constexpr int kRowWarps = 4;
constexpr int kDepthWarps = 2;
constexpr int kThreads = kRowWarps * kDepthWarps * kLanes;
constexpr int kRowTiles = 2;
constexpr int kRows = kRowWarps * kRowTiles * 16;
constexpr int kStages = 3;
// Bytes added to each row of activations in shared memory: moves neighbouring rows to other banks.
constexpr int kPadding = 16;

template <int kChunk, int kTokenTiles>
constexpr int ring_bytes() {
  return kStages * 8 * kTokenTiles * (kDepthWarps * kChunk * 2 + kPadding);
}

template <int kTokenTiles>
constexpr int sum_bytes() {
  return 8 * kTokenTiles * (kRows + 4) * 4;
}

template <int kChunk, int kTokenTiles>
constexpr int shared_bytes() {
  constexpr int kWork = kPairTableBytes + ring_bytes<kChunk, kTokenTiles>();
  return kWork > sum_bytes<kTokenTiles>() ? kWork : sum_bytes<kTokenTiles>();
}

template <class T, int kType, bool kNested, int kChunk, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles <= 2 ? 2 : 1)
    gemm4_tiles(const T* __restrict__ a, int m, int n, int k, const uint8_t* __restrict__ packed,
                const Statistics statistics, int block_shift, int nested_shift, const void* __restrict__ bias,
                int bias_dtype, T* __restrict__ out) {
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kStep = kDepthWarps * kChunk;  // columns per step of the thread block
  constexpr int kRowPitch = kStep * 2 + kPadding;
  constexpr int kStageBytes = kTokens * kRowPitch;
  constexpr int kDepth = 2;  // steps that codes are fetched ahead
  constexpr int kLaneBytes = kChunk / 8;
  constexpr int kLaneValues = kChunk / 4;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float nested_code[256];
  unsigned* table = reinterpret_cast<unsigned*>(shared);
  unsigned char* ring = shared + kPairTableBytes;

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps;
  const int g = lane / 4, t = lane % 4;
  const int splits = gridDim.x, split = blockIdx.x;
  const int first_row = blockIdx.y * kRows, first_token = blockIdx.z * kTokens;
  const int steps_total = (k + kStep - 1) / kStep;
  const int begin = static_cast<int>(static_cast<int64_t>(steps_total) * split / splits);
  const int end = static_cast<int>(static_cast<int64_t>(steps_total) * (split + 1) / splits);

  build_pair_table<T, kType>(table);
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  a = after_wait(a);
  packed = after_wait(packed);
  bias = after_wait(bias);
  const BlockScale<kNested, true> scale_of(statistics, nested_code, nested_shift);
  const unsigned lane_offset = 4 * lane;

  const auto stage_activations = [&](int step) {
    if (step < end) {
      unsigned char* stage = ring + (step - begin) % kStages * kStageBytes;
      constexpr int kPieces = kStep / 8;  // of 16 bytes in a row
      for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
        const int token = i / kPieces, piece = i % kPieces;
        const int column = step * kStep + piece * 8;
        const bool valid = first_token + token < m && column < k;
        const T* from = valid ? a + static_cast<int64_t>(first_token + token) * k + column : a;
        copy_async(stage + token * kRowPitch + piece * 16, from, valid);
      }
    }
    commit_copies();
  };

  int64_t row_begin[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + (row_warp * kRowTiles + r) * 16 + 8 * h + g;
      row_begin[r][h] = static_cast<int64_t>(min(row, n - 1)) * k;
    }
  }
  Codes<kChunk> codes[kDepth][kRowTiles][2];
  float scales[kDepth][kRowTiles][2];
  const auto fetch = [&](int slot, int step) {
    const int column = step * kStep + depth_warp * kChunk;
    if (step < end && column < k) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t element = row_begin[r][h] + column;
          codes[slot][r][h] = load_codes<kChunk>(packed + element / 2 + t * kLaneBytes);
          scales[slot][r][h] = scale_of(element >> block_shift);
        }
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    stage_activations(begin + s);
  }
  __syncthreads();
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    fetch(d, begin + d);
  }

  float sums[kRowTiles][kTokenTiles][4] = {};
  for (int base = begin; base < end; base += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int step = base + d;
      if (step >= end) {
        break;
      }
      wait_for_copies<kStages - 2>();
      __syncthreads();
      stage_activations(step + kStages - 1);
      if (step * kStep + depth_warp * kChunk < k) {
        const unsigned char* stage = ring + (step - begin) % kStages * kStageBytes;
        const unsigned char* mine = stage + depth_warp * kChunk * 2 + t * kLaneValues * 2;
        const LeftOperands<kChunk> left[kRowTiles] = {{shared, lane_offset, codes[d][0][0], codes[d][0][1]},
                                                      {shared, lane_offset, codes[d][1][0], codes[d][1][1]}};
        float scale[kRowTiles][2];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          scale[r][0] = scales[d][r][0];
          scale[r][1] = scales[d][r][1];
        }
        fetch(d, step + kDepth);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          unsigned values[kLaneValues / 2];
          const uint4* from = reinterpret_cast<const uint4*>(mine + (8 * j + g) * kRowPitch);
#pragma unroll
          for (int q = 0; q < kLaneValues / 8; ++q) {
            const uint4 four = from[q];
            values[4 * q] = four.x;
            values[4 * q + 1] = four.y;
            values[4 * q + 2] = four.z;
            values[4 * q + 3] = four.w;
          }
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            float block[4] = {};
#pragma unroll
            for (int i = 0; i < kChunk / 16; ++i) {
              multiply_tile<T>(block, left[r].registers[i], values[2 * i], values[2 * i + 1]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[r][j][i] = __fmaf_rn(block[i], scale[r][i / 2], sums[r][j][i]);
            }
          }
        }
      }
    }
  }

  // Sum over the two halves of the block, then over the cluster, in shared memory: token by row.
  wait_for_copies<0>();
  __syncthreads();
  constexpr int kPitch = kRows + 4;
  float* total = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int half = 0; half < kDepthWarps; ++half) {
    if (depth_warp == half) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = (row_warp * kRowTiles + r) * 16 + 8 * (i / 2) + g, token = 8 * j + 2 * t + i % 2;
            float& cell = total[token * kPitch + row];
            cell = half == 0 ? sums[r][j][i] : cell + sums[r][j][i];
          }
        }
      }
    }
    __syncthreads();
  }
#if BNB_DEVICE_ARCH >= 900
  if (splits > 1) {
    cooperative_groups::this_cluster().sync();
  }
#endif
  // Each thread block of a cluster finishes its share of the tile.
  const int cells = kTokens * kRows;
  const int share = (cells / splits + kThreads - 1) / kThreads * kThreads;
  const int stop = min(cells, (split + 1) * share);
  for (int i = split * share + threadIdx.x; i < stop; i += kThreads) {
    const int token = i / kRows, row = i % kRows;
    float sum = 0.0f;
    if (splits == 1) {
      sum = total[token * kPitch + row];
    }
#if BNB_DEVICE_ARCH >= 900
    else {
      auto cluster = cooperative_groups::this_cluster();
      for (int s = 0; s < splits; ++s) {
        sum += cluster.map_shared_rank(total, s)[token * kPitch + row];
      }
    }
#endif
    if (first_row + row < n && first_token + token < m) {
      out[static_cast<int64_t>(first_token + token) * n + first_row + row] =
          from_float<T>(sum + load_bias(bias, bias_dtype, first_row + row));
    }
  }
#if BNB_DEVICE_ARCH >= 900
  if (splits > 1) {
    cooperative_groups::this_cluster().sync();
  }
#endif
}

template <class T, int kType, bool kNested, int kChunk, int kTokenTiles>
void run(const Launch& launch, const Gemm4& p, int split) {
  const auto kernel = gemm4_tiles<T, kType, kNested, kChunk, kTokenTiles>;
  constexpr int kShared = shared_bytes<kChunk, kTokenTiles>();
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), kShared);
  const dim3 grid(split, static_cast<unsigned>(ceil_div(p.n, kRows)),
                  static_cast<unsigned>(ceil_div(p.m, 8 * kTokenTiles)));
  launch_dependent(kernel, {grid, kThreads, kShared, split}, launch, "gemm_4bit", static_cast<const T*>(p.a),
                   static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), p.packed, p.statistics,
                   exact_log2(p.blocksize), exact_log2(p.statistics.nested_blocksize), p.bias, p.bias_dtype,
                   static_cast<T*>(p.out));
}

}  // namespace

bool gemm_4bit_fits(int64_t n, int64_t k, int64_t blocksize, int dtype, int capability) {
  return capability >= 80 && dtype != static_cast<int>(bnb::Dtype::kFloat32) && k > 0 && n > 0 &&
         k % (blocksize % 64 == 0 ? 64 : 32) == 0 && exact_log2(blocksize) >= 5 && n < (int64_t{1} << 31) &&
         k < (int64_t{1} << 31);
}

void gemm_4bit_tiles(const Launch& launch, const Gemm4& p, int split) {
  with_half_dtype(p.dtype, [&](auto type) {
    with_quant_type(p.quant_type, [&](auto quant) {
      with_nested(p.statistics, [&](auto nested) {
        with_chunk(p.blocksize, [&](auto chunk) {
          using T = typename decltype(type)::type;
          constexpr int kType = decltype(quant)::value, kChunk = decltype(chunk)::value;
          constexpr bool kNested = decltype(nested)::value;
          if (p.m <= 16) {
            run<T, kType, kNested, kChunk, 2>(launch, p, split);
          } else if (p.m <= 32) {
            run<T, kType, kNested, kChunk, 4>(launch, p, split);
          } else {
            run<T, kType, kNested, kChunk, 8>(launch, p, split);
          }
        });
      });
    });
  });
  check_launch("gemm_4bit");
}

}  // namespace bnb_gpu
