// Products of a 4-bit weight with 17 and more rows of activations on compute capability 9.0.
//
// A thread block computes tiles of 128 rows of the weight times 32, 64 or 128 rows of activations. One warp has
// the copy engine bring codes and activations into a ring in shared memory, 128 columns per stage. Groups of four
// warps decode codes into registers, the left operand of the matrix units, half a chunk while these multiply the
// half before; the right operand stays in shared memory. Sums over a block of the weight are scaled in float32.
// Two groups share the rows of a tile and, with few activations, two the columns of a stage. Where a grid of tiles
// would leave multiprocessors idle, the thread blocks of a cluster split the columns; otherwise a thread block takes
// tiles in turn.
#include <type_traits>

#include "clusters.h"
#include "gemm4.h"
#include "tensor_map.h"
#include "wgmma.h"

#ifndef BNB_HIP
#include <cooperative_groups.h>

namespace bnb_gpu {
namespace {

constexpr int kRowGroups = 2;
constexpr int kRows = 64 * kRowGroups;
constexpr int kChunk = 64;
constexpr int kHalf = kChunk / 2;
constexpr int kStep = 2 * kChunk;  // columns of a stage
constexpr int kCodePitch = kStep / 2;
constexpr int kCodeBytes = kRows * kCodePitch;

template <int kTokens>
struct Shape {
  // Groups that share the columns of a stage.
  static constexpr int kDepthGroups = kTokens <= 64 ? 2 : 1;
  static constexpr int kMathThreads = kRowGroups * kDepthGroups * kGroupThreads;
  static constexpr int kThreads = kMathThreads + kGroupThreads;
  // Registers move from the warps that copy to those that multiply.
  static constexpr int kCopyRegisters = kDepthGroups > 1 ? 32 : 24, kMathRegisters = kDepthGroups > 1 ? 112 : 240;
  static constexpr int kTileBytes = kTokens * kSwizzledRowBytes;  // activations of one chunk
  static constexpr int kStageBytes = kCodeBytes + 2 * kTileBytes;
  static constexpr int kSumPitch = kRows + 4;
  static constexpr int kExchangeBytes = kDepthGroups > 1 ? kTokens * kSumPitch * 4 : 0;
  static constexpr int kFixedBytes = kSpreadTableBytes + 256 * 4 + kExchangeBytes + 256;
  static constexpr int kFit = (kSharedLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kTable = kStages * kStageBytes;
  static constexpr int kNestedCode = kTable + kSpreadTableBytes;
  static constexpr int kExchange = kNestedCode + 256 * 4;
  static constexpr int kBarriers = kExchange + kExchangeBytes;
  static constexpr int kBytes = kBarriers + 256;
  static_assert(kTokens * kSumPitch * 4 <= kTable, "the sums of a cluster take the place of the ring");
};

// The products of a call, and what of them a thread block computes.
struct Problem {
  int m, n, k;
  int splits;       // thread blocks of a cluster, each with a share of the columns
  int tile_tokens;  // rows of activations of a tile; more have room
  int block_shift, nested_shift;
  const void* bias;
  int bias_dtype;
};

// The part of a lane in decoding: byte t of each word of rows g and g + 8, through its own copy of the table.
struct Decoder {
  const unsigned char* table;
  unsigned lane_offset, selector;

  // `codes`: those of row g in half a chunk.
  __device__ __forceinline__ void operator()(unsigned (&left)[kHalf / 16][4], const unsigned char* codes) const {
    unsigned words[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 four = *reinterpret_cast<const uint4*>(codes + h * 8 * kCodePitch);
      words[h][0] = four.x;
      words[h][1] = four.y;
      words[h][2] = four.z;
      words[h][3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < kHalf / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        left[i][j] = decode_spread(table, lane_offset, words[j % 2][2 * i + j / 2], selector);
      }
    }
  }
};

template <class T, int kType, bool kNested, int kTokens>
__global__ void __launch_bounds__(Shape<kTokens>::kThreads, 1)
    gemm4_groups(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap weight,
                 const Problem problem, const Statistics statistics, T* __restrict__ out) {
#if BNB_WGMMA
  using Layout = Shape<kTokens>;
  using Scale = BlockScale<kNested, true>;
  constexpr int kDepthGroups = Layout::kDepthGroups, kStages = Layout::kStages;
  constexpr int kSums = kTokens / 2;
  extern __shared__ __align__(1024) unsigned char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  uint64_t* drained = full + kStages;

  const int m = problem.m, n = problem.n, k = problem.k, splits = problem.splits, tile_tokens = problem.tile_tokens;
  const int split = static_cast<int>(blockIdx.x) % splits;
  const int token_tiles = (m + kTokens - 1) / kTokens, tiles = (n + kRows - 1) / kRows * token_tiles;
  const int first_tile = static_cast<int>(blockIdx.x) / splits;
  const int tile_stride = splits > 1 ? tiles : static_cast<int>(gridDim.x);
  const int steps_total = (k + kStep - 1) / kStep;
  const int begin = static_cast<int>(static_cast<int64_t>(steps_total) * split / splits);
  const int steps = static_cast<int>(static_cast<int64_t>(steps_total) * (split + 1) / splits) - begin;
  // Thread blocks begin at different columns, or all of them would want the same activations at once.
  const auto rotation_of = [&](int tile) { return tile / token_tiles * 3 % steps; };
  const auto column_of = [&](int rotation, int step) {
    const int place = step + rotation;
    return (begin + (place >= steps ? place - steps : place)) * kStep;
  };
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  constexpr int kMathWarps = Layout::kMathThreads / kLanes;

  if (warp == kMathWarps && lane == 0) {
    for (int s = 0; s < kStages; ++s) {
      initialize(full + s, 1);
      initialize(drained + s, kMathWarps * kWarpArrivals);
    }
    publish_barriers();
    publish_to_matrix_units();
    if (first_tile < tiles) {
      const int row = first_tile / token_tiles * kRows, rotation = rotation_of(first_tile);
      for (int step = 0; step < min(steps, kPrefetchedStages); ++step) {
        prefetch_box(weight, column_of(rotation, step) / 2, row);
      }
    }
  }
  build_pair_table<T, kType, kSpreadTablePitch>(reinterpret_cast<unsigned*>(shared + Layout::kTable));
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  const Scale scale_of(statistics, reinterpret_cast<float*>(shared + Layout::kNestedCode), problem.nested_shift);
  __syncthreads();

  auto cluster = cooperative_groups::this_cluster();
  if (warp >= kMathWarps) {
    keep_fewer_registers<Layout::kCopyRegisters>();
    if (warp == kMathWarps && lane == 0) {
      RingPlace<kStages> place;
      const int stage_bytes = Layout::kStageBytes - 2 * (kTokens - tile_tokens) * kSwizzledRowBytes;
      for (int tile = first_tile; tile < tiles; tile += tile_stride) {
        const int row = tile / token_tiles * kRows, token = tile % token_tiles * tile_tokens;
        const int rotation = rotation_of(tile);
        for (int step = 0; step < steps; ++step) {
          unsigned char* stage = shared + place.slot * Layout::kStageBytes;
          uint64_t* barrier = full + place.slot;
          const int column = column_of(rotation, step);
          wait(drained + place.slot, place.parity ^ 1);
          arrive_expecting(barrier, stage_bytes);
          copy_box(stage + 2 * Layout::kTileBytes, weight, column / 2, row, barrier);
          copy_box(stage, activations, column, token, barrier);
          copy_box(stage + Layout::kTileBytes, activations, column + kChunk, token, barrier);
          place.advance();
        }
      }
    }
    __syncwarp();
    if (splits > 1) {
      cluster.sync();
      cluster.sync();
    }
  } else {
    take_more_registers<Layout::kMathRegisters>();
    float sums[kSums];
    // The same in all lanes, as the compiler learns by this.
    const int group = shuffle(static_cast<int>(threadIdx.x) / kGroupThreads, 0);
    const int row_group = group % kRowGroups, depth = group / kRowGroups;
    const int g = lane / 4, t = lane % 4;
    const int own_row = row_group * 64 + warp % 4 * 16 + g;
    const Decoder decode{shared + Layout::kTable, 4u * lane, spread_selector(t)};
    RingPlace<kStages> place;
    float block[kSums];
    // The left operands of both halves of a chunk: one is decoded while the other one is multiplied.
    unsigned left[2][kHalf / 16][4];
    const auto decode_half = [&](int half, int slot, int chunk) {
      // The copy engine exchanges the 16-byte pieces of a row, so that all banks serve eight rows.
      const int piece = (chunk * 2 + half) ^ (g >> 1 & 3);
      decode(left[half],
             shared + slot * Layout::kStageBytes + 2 * Layout::kTileBytes + own_row * kCodePitch + piece * (kHalf / 2));
    };
    const auto multiply_half = [&](int half, int slot, int chunk) {
      const uint64_t right = tile_descriptor(shared + slot * Layout::kStageBytes + chunk * Layout::kTileBytes);
      begin_products();
#pragma unroll
      for (int i = 0; i < kHalf / 16; ++i) {
        multiply_group<T>(block, left[half][i], right + 2 * (i + half * (kHalf / 16)), half + i > 0);
      }
      commit_products();
    };
    const auto release = [&] {
      arrive_as_warp(drained + place.slot, lane);
      place.advance();
    };

    for (int tile = first_tile; tile < tiles; tile += tile_stride) {
      const int first_row = tile / token_tiles * kRows, first_token = tile % token_tiles * tile_tokens;
      const int end_token = min(first_token + tile_tokens, m);
      // Statistics of four chunks at a time, one per lane of four, and those of the next four on their way.
      constexpr int kPerStep = 2 / kDepthGroups;
      const int rotation = rotation_of(tile);
      int64_t row_begin[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_begin[h] = static_cast<int64_t>(min(first_row + own_row + 8 * h, n - 1)) * k;
      }
      typename Scale::Stored coming[2];
      float current[2] = {};
      const auto fetch_scales = [&](int item) {
        const int own = min(item + t, steps * kPerStep - 1);
        const int column = column_of(rotation, own / kPerStep) + (kDepthGroups > 1 ? depth : own % kPerStep) * kChunk;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          coming[h] = scale_of.fetch((row_begin[h] + min(column, k - 1)) >> problem.block_shift);
        }
      };
      // Adds the products of a chunk, once the matrix units are through with it.
      const auto add_block = [&](int item) {
        const int from = (lane & ~3) | item % 4;
        const float upper = shuffle(current[0], from), lower = shuffle(current[1], from);
        wait_for_products(block);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          sums[i] = __fmaf_rn(block[i], i % 4 < 2 ? upper : lower, sums[i]);
        }
      };
      fetch_scales(0);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[i] = 0.0f;
      }

      const int items = steps * kPerStep;
      wait(full + place.slot, place.parity);
      decode_half(0, place.slot, kDepthGroups > 1 ? depth : 0);
      for (int first = 0; first < items; first += 4) {
        current[0] = scale_of.value(coming[0]);
        current[1] = scale_of.value(coming[1]);
        fetch_scales(first + 4);
        // Written out four times: what is on its way moves to no other register, which would have to wait for it.
#pragma unroll
        for (int next_item = kPerStep; next_item <= 4; next_item += kPerStep) {
          if (first + next_item > items) {
            break;
          }
#pragma unroll
          for (int c = 0; c < kPerStep; ++c) {
            const int chunk = kDepthGroups > 1 ? depth : c;
            multiply_half(0, place.slot, chunk);
            decode_half(1, place.slot, chunk);
            multiply_half(1, place.slot, chunk);
            wait_for_products_but<1>();
            if (c + 1 < kPerStep) {
              decode_half(0, place.slot, c + 1);
            } else if (first + next_item < items) {
              RingPlace<kStages> next = place;
              next.advance();
              wait(full + next.slot, next.parity);
              decode_half(0, next.slot, kDepthGroups > 1 ? depth : 0);
            }
            add_block(next_item - kPerStep + c);
          }
          release();
        }
      }

      if (splits == 1) {
        if constexpr (kDepthGroups > 1) {
          float* exchange = reinterpret_cast<float*>(shared + Layout::kExchange);
          const auto cell = [&](int i) -> float& {
            const int token = 8 * (i / 4) + 2 * t + i % 2;
            return exchange[token * Layout::kSumPitch + own_row + 8 * (i % 4 / 2)];
          };
          if (depth == 1) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
              cell(i) = sums[i];
            }
          }
          synchronize_some(1 + row_group, kDepthGroups * kGroupThreads);
          if (depth == 0) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
              sums[i] += cell(i);
            }
          }
          synchronize_some(1 + row_group, kDepthGroups * kGroupThreads);
        }
        if (depth == 0) {
          float bias[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = first_row + own_row + 8 * h;
            bias[h] = load_bias(row < n ? problem.bias : nullptr, problem.bias_dtype, row);
          }
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            const int token = first_token + 8 * (i / 4) + 2 * t + i % 2, row = first_row + own_row + 8 * (i % 4 / 2);
            if (token < end_token && row < n) {
              out[static_cast<int64_t>(token) * n + row] = from_float<T>(sums[i] + bias[i % 4 / 2]);
            }
          }
        }
      }
    }
    if (splits > 1) {
      // Sum over the two halves of the stages, then over the cluster, in shared memory: token by row.
      synchronize_some(3, Layout::kMathThreads);
      float* total = reinterpret_cast<float*>(shared);
#pragma unroll
      for (int half = 0; half < kDepthGroups; ++half) {
        if (depth == half) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            const int row = own_row + 8 * (i % 4 / 2), token = 8 * (i / 4) + 2 * t + i % 2;
            float& cell = total[token * Layout::kSumPitch + row];
            cell = half == 0 ? sums[i] : cell + sums[i];
          }
        }
        synchronize_some(3, Layout::kMathThreads);
      }
      cluster.sync();
      // Each thread block of a cluster finishes its share of the tile, four rows at a time.
      constexpr int kVectors = kTokens * kRows / 4, kRowVectors = kRows / 4;
      const int first_row = first_tile / token_tiles * kRows, first_token = first_tile % token_tiles * tile_tokens;
      const int end_token = min(first_token + tile_tokens, m);
      const int share = (kVectors + splits - 1) / splits;
      const int stop = min(kVectors, (split + 1) * share);
      for (int i = split * share + static_cast<int>(threadIdx.x); i < stop; i += Layout::kMathThreads) {
        const int token = i / kRowVectors, row = i % kRowVectors * 4;
        // All parts are on their way before the first one is needed.
        float4 parts[kMostSplit];
#pragma unroll
        for (int s = 0; s < kMostSplit; ++s) {
          if (s < splits) {
            parts[s] =
                *reinterpret_cast<const float4*>(cluster.map_shared_rank(total, s) + token * Layout::kSumPitch + row);
          }
        }
        float sum[4] = {};
#pragma unroll
        for (int s = 0; s < kMostSplit; ++s) {
          if (s < splits) {
            sum[0] += parts[s].x;
            sum[1] += parts[s].y;
            sum[2] += parts[s].z;
            sum[3] += parts[s].w;
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (first_row + row + j < n && first_token + token < end_token) {
            out[static_cast<int64_t>(first_token + token) * n + first_row + row + j] =
                from_float<T>(sum[j] + load_bias(problem.bias, problem.bias_dtype, first_row + row + j));
          }
        }
      }
      cluster.sync();
    }
  }
#endif
}

template <class T, int kType, bool kNested, int kTokens>
void run(const Launch& launch, const Gemm4& p, int split) {
  using Layout = Shape<kTokens>;
  const auto kernel = gemm4_groups<T, kType, kNested, kTokens>;
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), Layout::kBytes);
  const int tokens = tile_share(p.m, ceil_div(p.m, kTokens));
  const CUtensorMap activations =
      matrix_map(p.a, tensor_map_type<T>(), 2, p.m, p.k, tokens, kChunk, CU_TENSOR_MAP_SWIZZLE_128B);
  const CUtensorMap weight = matrix_map(p.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.n, p.k / 2, kRows, kCodePitch,
                                        CU_TENSOR_MAP_SWIZZLE_64B);
  const Problem problem{static_cast<int>(p.m),
                        static_cast<int>(p.n),
                        static_cast<int>(p.k),
                        split,
                        tokens,
                        exact_log2(p.blocksize),
                        exact_log2(p.statistics.nested_blocksize),
                        p.bias,
                        p.bias_dtype};
  const int64_t tiles = ceil_div(p.n, kRows) * ceil_div(p.m, kTokens);
  const dim3 blocks(split > 1 ? static_cast<unsigned>(tiles * split) : launch.grid(tiles, 1));
  launch_dependent(kernel, {blocks, Layout::kThreads, Layout::kBytes, split}, launch, "gemm_4bit", activations, weight,
                   problem, p.statistics, static_cast<T*>(p.out));
}

}  // namespace

void gemm_4bit_groups(const Launch& launch, const Gemm4& p, int split) {
  with_half_dtype(p.dtype, [&](auto type) {
    with_quant_type(p.quant_type, [&](auto quant) {
      with_nested(p.statistics, [&](auto nested) {
        using T = typename decltype(type)::type;
        constexpr int kType = decltype(quant)::value;
        constexpr bool kNested = decltype(nested)::value;
        if (p.m <= 32) {
          run<T, kType, kNested, 32>(launch, p, split);
        } else if (p.m <= 64) {
          run<T, kType, kNested, 64>(launch, p, split);
        } else {
          run<T, kType, kNested, 128>(launch, p, split);
        }
      });
    });
  });
  check_launch("gemm_4bit");
}

}  // namespace bnb_gpu
#endif
