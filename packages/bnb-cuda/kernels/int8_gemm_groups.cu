// int8 products on compute capability 9.0, all in one kernel: any number of rows of activations.
//
// A thread block computes tiles of 64 or 128 rows of activations times 64 to 256 rows of the weight, in turn. One
// warp has the copy engine bring both into a ring in shared memory, 128 columns per stage; two groups of four warps
// multiply them with the matrix units, while the next tile's columns already arrive. Two thread blocks of a cluster
// that share rows of the weight bring one half of them each, for both.
//
// The warps that have nothing to copy fetch what a tile needs in the end, while it is multiplied: one of them scales,
// bias and outlier columns of the activations, the others those of the weight. Stages of outlier columns follow those
// of integers, whose scaled sums they add to; see int8_outliers.h.
#include <type_traits>

#include "clusters.h"
#include "int8_outliers.h"

#ifndef BNB_HIP
#include <cooperative_groups.h>

namespace bnb_gpu {
namespace {

constexpr int kMathWarps = kMathThreads / kLanes;
constexpr int kThreads = kMathThreads + kGroupThreads;
constexpr int kStep = kSwizzledRowBytes;  // columns of a stage
constexpr int kSlots = 2;                 // of constants of a tile
// Besides the warp that copies and the pickers.
constexpr int kConstantThreads = kLanes;
static_assert(kGroupThreads == kLanes + kConstantThreads + kPickers * kLanes, "all warps have a role");
// Up to so many columns, rounded up, gathering costs less than multiplying all columns in place (measured on an H200).
constexpr int kGatheredShare = 8;
// Columns that find room in a list in shared memory.
constexpr int kMostListed = kMostColumns / kGatheredShare;
static_assert(kMostListed % kGatheredMultiple == 0, "as many as are gathered");

template <bool kOutliers, int kTokens, int kRows, int kCluster>
struct Shape {
  // Groups share the rows of activations, or those of the weight.
  static constexpr bool kSharesTokens = kTokens == 128;
  static constexpr int kGroupRows = kSharesTokens ? kRows : kRows / kMathGroups;
  static constexpr int kTokenBytes = kTokens * kStep;
  static constexpr int kStageBytes = kTokenBytes + kRows * kStep;
  static constexpr int kMaskedBytes = kTokenBytes + kRows * kOutlierStep;  // of a stage to be masked
  // Scales of tokens, scales of rows of the weight, bias of these rows; as floats.
  static constexpr int kConstants = kTokens + 2 * kRows;
  static constexpr int kBoxRows = kRows / kCluster;
  static constexpr int kPanelBytes = kOutliers ? kBoxRows * kStep : 0;
  static constexpr int kListBytes = kOutliers ? 4 * (kMergedWords + kMostListed) : 0;
  static constexpr int kFit = (kSharedLimit - kPanelBytes - kListBytes - kSlots * 4 * kConstants) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kPanelBegin = kStages * kStageBytes;
  static constexpr int kMergedBegin = kPanelBegin + kPanelBytes;
  static constexpr int kConstantsBegin = kMergedBegin + kListBytes;
  static constexpr int kBarriers = kConstantsBegin + kSlots * 4 * kConstants;
  static constexpr int kBytes = kBarriers + 256;
};

// Fetches the constants of a tile; zeros beyond the matrices.
template <int kTokens, int kRows>
__device__ __forceinline__ void fetch_constants(float* constants, const Problem& p, int first_token, int first_row,
                                                int thread) {
  for (int i = thread; i < kTokens; i += kConstantThreads) {
    constants[i] = first_token + i < p.m ? p.a_absmax[first_token + i] : 0.0f;
  }
  for (int i = thread; i < kRows; i += kConstantThreads) {
    const int row = first_row + i;
    constants[kTokens + i] = row < p.n ? p.b_absmax[row] : 0.0f;
    constants[kTokens + kRows + i] = load_bias(row < p.n ? p.bias : nullptr, p.bias_dtype, row);
  }
}

// Four lanes hold a pair of neighbouring columns each of four groups of eight columns; afterwards each lane holds
// one group.
__device__ __forceinline__ void transpose_quad(unsigned (&words)[4], int t) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = (t & distance) != 0;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if ((low & distance) == 0) {
        const int high = low | distance;
        const unsigned got = __shfl_xor_sync(0xffffffffu, upper ? words[low] : words[high], distance);
        words[low] = upper ? got : words[low];
        words[high] = upper ? words[high] : got;
      }
    }
  }
}

// Writes 32 columns of the result in one of its rows, if it comes before `end_token`; four lanes have two columns of
// each of four groups of eight.
template <class T>
__device__ __forceinline__ void store_rows(T* out, unsigned (&words)[4], const Problem& p, int token, int end_token,
                                           int column, int t) {
  T* to = out + static_cast<int64_t>(token) * p.n + column;
  if (p.n % 8 == 0) {
    transpose_quad(words, t);
    if (token < end_token && column + 8 * t < p.n) {
      *reinterpret_cast<uint4*>(to + 8 * t) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    T pair[2];
    memcpy(pair, &words[j], sizeof pair);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (token < end_token && column + 8 * j + 2 * t + c < p.n) {
        to[8 * j + 2 * t + c] = pair[c];
      }
    }
  }
}

// Codes of the activations and of the weight; for a few outlier columns both side by side, for many all values and
// again the weight.
struct Maps {
  CUtensorMap activations, weight, few_values, few_codes, picked_codes, all_values, all_codes;
};

template <class T, bool kOutliers, int kTokens, int kRows, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    int8_groups(const __grid_constant__ Maps maps, const Problem p, T* __restrict__ out) {
#if BNB_WGMMA
  using Layout = Shape<kOutliers, kTokens, kRows, kCluster>;
  constexpr int kStages = Layout::kStages, kGroupRows = Layout::kGroupRows;
  extern __shared__ __align__(1024) unsigned char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  uint64_t* drained = full + kStages;
  uint64_t* known = drained + kStages;
  uint64_t* read = known + kSlots;
  uint64_t* picked = read + kSlots;
  // Where flags of rows are left to this thread block: they are merged, the columns are listed.
  uint64_t* merged = picked + 1;
  uint64_t* listed = merged + 1;
  int* listed_count = reinterpret_cast<int*>(listed + 1);

  const int rank = kCluster > 1 ? static_cast<int>(blockIdx.x) % kCluster : 0;
  const int token_tiles = (p.m + kTokens * kCluster - 1) / (kTokens * kCluster);
  const int tiles = (p.n + kRows - 1) / kRows * token_tiles;
  const int first_tile = static_cast<int>(blockIdx.x) / kCluster, stride = static_cast<int>(gridDim.x) / kCluster;
  const int steps = (p.k + kStep - 1) / kStep;
  // Neighbouring thread blocks share rows of the weight, which then stay in the cache.
  const auto token_of = [&](int tile) { return (tile % token_tiles * kCluster + rank) * p.tile_tokens; };
  const auto row_of = [&](int tile) { return tile / token_tiles * kRows; };
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float* constants = reinterpret_cast<float*>(shared + Layout::kConstantsBegin);

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      initialize(full + s, 1);
      initialize(drained + s, (kMathWarps + (kOutliers ? kPickers : 0)) * kCluster);
    }
    for (int s = 0; s < kSlots; ++s) {
      initialize(known + s, kConstantThreads);
      initialize(read + s, kMathWarps * kWarpArrivals);
    }
    initialize(picked, kPickers * kWarpArrivals);
    initialize(merged, kMathWarps * kWarpArrivals);
    initialize(listed, kWarpArrivals);
    publish_barriers();
    for (int step = 0; step < min(steps, kPrefetchedStages); ++step) {
      prefetch_box(maps.weight, step * kStep, row_of(first_tile) + rank * Layout::kBoxRows);
    }
  }
  const bool merges = kOutliers && p.row_flags != nullptr;
  unsigned* merged_flags = reinterpret_cast<unsigned*>(shared + Layout::kMergedBegin);
  int* list = reinterpret_cast<int*>(merged_flags + kMergedWords);
  if (merges) {
    clear_merged<kThreads>(merged_flags, p.k);
  }
  auto cluster = cooperative_groups::this_cluster();
  if constexpr (kCluster > 1) {
    cluster.sync();
  } else {
    __syncthreads();
  }

  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  SeenOutliers seen{p.outliers.columns, p.outliers.flags, kOutliers && !merges ? *p.outliers.count : 0};
  // Each warp looks as late as it can.
  const auto see = [&] {
    if (merges) {
      wait(listed, 0);
      seen = {list, merged_flags, *listed_count};
    }
  };

  if (warp >= kMathWarps) {
    keep_fewer_registers<72>();
    if (warp == kMathWarps) {
      if (lane == 0) {
        RingPlace<kStages> place;
        int picked_parity = 0;
        // Has a stage brought, with `bytes` in all: rows of the activations, and this thread block's share of the
        // weight for all of the cluster, to `box`.
        const auto bring = [&](int bytes, const CUtensorMap& left, int token, const CUtensorMap& right, int row,
                               int column, int box) {
          unsigned char* stage = shared + place.slot * Layout::kStageBytes;
          uint64_t* barrier = full + place.slot;
          wait(drained + place.slot, place.parity ^ 1);
          arrive_expecting(barrier, bytes - (kTokens - p.tile_tokens) * kStep);
          copy_box(stage, left, column, token, barrier);
          if constexpr (kCluster > 1) {
            copy_box_to((1 << kCluster) - 1, stage + Layout::kTokenBytes + box, right, column, row, barrier);
          } else {
            copy_box(stage + Layout::kTokenBytes + box, right, column, row, barrier);
          }
          place.advance();
        };
        for (int tile = first_tile; tile < tiles; tile += stride) {
          const int token = token_of(tile), box_row = rank * Layout::kBoxRows, row = row_of(tile) + box_row;
          for (int step = 0; step < steps; ++step) {
            bring(Layout::kStageBytes, maps.activations, token, maps.weight, row, step * kStep, box_row * kStep);
          }
          see();
          if (seen.gathered(p) > 0) {
            if (tile == first_tile) {
              wait_for_gathered(p);
            }
            wait(picked, picked_parity);
            picked_parity ^= 1;
          }
          for (int step = 0; step < seen.steps(p); ++step) {
            if (seen.masked(p)) {
              bring(Layout::kMaskedBytes, maps.all_values, token, maps.all_codes, row, step * kOutlierStep,
                    box_row * kOutlierStep);
            } else {
              bring(Layout::kStageBytes, maps.few_values, token, maps.few_codes, row, step * kOutlierStep,
                    box_row * kStep);
            }
          }
        }
      }
      __syncwarp();
    } else if (warp == kMathWarps + 1) {
      if constexpr (kOutliers) {
        see();
        if (seen.gathered(p) > 0) {
          gather_outliers<T>(p, seen, lane);
        }
      }
      RingPlace<kSlots> place;
      for (int tile = first_tile; tile < tiles; tile += stride) {
        wait(read + place.slot, place.parity ^ 1);
        fetch_constants<kTokens, kRows>(constants + place.slot * Layout::kConstants, p, token_of(tile), row_of(tile),
                                        lane);
        arrive(known + place.slot);
        place.advance();
      }
      __syncwarp();
    } else if constexpr (kOutliers) {
      if (merges && warp == kMathWarps + 2) {
        wait(merged, 0);
        const int found = list_flagged(merged_flags, p.k, p.room, list);
        if (lane == 0) {
          *listed_count = found;
        }
        arrive_as_warp(listed, lane);
      }
      see();
      const StageRelease<kCluster> release(drained, lane);
      // A picker's share of the rows that this thread block brings.
      constexpr int kOwnRows = Layout::kBoxRows / kPickers;
      const int own = (warp - kMathWarps - 2) * kOwnRows, box_row = rank * Layout::kBoxRows + own;
      RingPlace<kStages> place;
      const auto pass_stage = [&](auto&& use) {
        wait(full + place.slot, place.parity);
        use(shared + place.slot * Layout::kStageBytes + Layout::kTokenBytes + box_row * kStep);
        release(place.slot);
        place.advance();
      };
      for (int tile = first_tile; tile < tiles; tile += stride) {
        CodePicker<T, kOwnRows> codes(seen.columns, seen.gathered(p), maps.picked_codes, row_of(tile) + box_row,
                                      shared + Layout::kPanelBegin + own * kStep, lane);
        for (int step = 0; step < steps; ++step) {
          pass_stage([&](const unsigned char* stage) { codes.pick(stage, (step + 1) * kStep); });
        }
        codes.finish();
        arrive_as_warp(picked, lane);
        for (int step = 0; step < seen.steps(p); ++step) {
          pass_stage([](const unsigned char*) {});
        }
      }
      __syncwarp();
    }
  } else {
    take_more_registers<216>();
    if (merges) {
      merge_rows<kMathThreads>(merged_flags, p.row_flags, p.m, p.k, static_cast<int>(threadIdx.x));
      arrive_as_warp(merged, lane);
    }
    const int group = threadIdx.x / kGroupThreads, g = lane / 4, t = lane % 4;
    // The tokens and rows of the weight that this group multiplies, within a tile.
    const int group_token = Layout::kSharesTokens ? group * 64 : 0,
              group_row = Layout::kSharesTokens ? 0 : group * kGroupRows;
    const int own_token = group_token + warp % 4 * 16 + g;
    const StageRelease<kCluster> release(drained, lane);
    RingPlace<kStages> place;
    RingPlace<kSlots> constants_place;
    for (int tile = first_tile; tile < tiles; tile += stride) {
      int sums[kGroupRows / 2];
      int held = 0;
      for (int step = 0; step < steps; ++step) {
        const unsigned char* stage = shared + place.slot * Layout::kStageBytes;
        const uint64_t left = tile_descriptor(stage + group_token * kStep);
        const uint64_t right = tile_descriptor(stage + Layout::kTokenBytes + group_row * kStep);
        wait(full + place.slot, place.parity);
        begin_products();
#pragma unroll
        for (int i = 0; i < kStep / 32; ++i) {
          multiply_group(sums, left + 2 * i, right + 2 * i, step + i > 0);
        }
        commit_products();
        // The products of the stage before are through: it can be filled again.
        wait_for_products_but<1>();
        if (step > 0) {
          release(held);
        }
        held = place.slot;
        place.advance();
      }
      wait_for_products(sums);
      release(held);

      const int token = token_of(tile) + own_token, end_token = min(token_of(tile) + p.tile_tokens, p.m);
      const int first_row = row_of(tile) + group_row;
      const float* own = constants + constants_place.slot * Layout::kConstants;
      wait(known + constants_place.slot, constants_place.parity);
      const float token_scale[2] = {own[own_token], own[own_token + 8]};
      if constexpr (kOutliers) {
        // From here on the registers hold float32, without the scales of the weight's rows.
#pragma unroll
        for (int i = 0; i < kGroupRows / 2; ++i) {
          sums[i] = __float_as_int(__int2float_rn(sums[i]) * (token_scale[i % 4 / 2] * (1.0f / 127.0f)));
        }
        see();
        const bool masked = seen.masked(p);
        const int outlier_steps = seen.steps(p);
        MaskedStages<T, kTokens, kRows> stages(p, seen.flags, token_of(tile), own, masked);
        const auto arrived_stage = [&](int step) {
          wait(full + place.slot, place.parity);
          if (masked) {
            stages.make_operands(shared + place.slot * Layout::kStageBytes, step);
          }
        };
        if (outlier_steps > 0) {
          arrived_stage(0);
        }
#pragma unroll 1
        for (int step = 0; step < outlier_steps; ++step) {
          const unsigned char* stage = shared + place.slot * Layout::kStageBytes;
          const uint64_t left = tile_descriptor(stage + group_token * kStep);
          const uint64_t right = tile_descriptor(stage + Layout::kTokenBytes + group_row * kStep);
          begin_products();
#pragma unroll
          for (int i = 0; i < kStep / 32; ++i) {
            multiply_group<T>(sums, left + 2 * i, right + 2 * i, true);
          }
          commit_products();
          held = place.slot;
          place.advance();
          // The next stage, while the matrix units are at work.
          if (step + 1 < outlier_steps) {
            arrived_stage(step + 1);
          }
          wait_for_products(sums);
          release(held);
        }
      }
#pragma unroll
      for (int q = 0; q < kGroupRows / 32; ++q) {
        unsigned words[2][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* of_row = own + kTokens + group_row + 32 * q + 8 * j + 2 * t;
          const float2 scale = *reinterpret_cast<const float2*>(of_row);
          const float2 offset = *reinterpret_cast<const float2*>(of_row + kRows);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int i = 16 * q + 4 * j + 2 * h;
            const auto result = [&](int sum, float row_scale, float bias) {
              return kOutliers ? __fmaf_rn(__int_as_float(sum), row_scale * (1.0f / 127.0f), bias)
                               : scaled_product(sum, token_scale[h], row_scale, 0.0f, bias);
            };
            words[h][j] = pack_pair<T>(result(sums[i], scale.x, offset.x), result(sums[i + 1], scale.y, offset.y));
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          store_rows<T>(out, words[h], p, token + 8 * h, end_token, first_row + 32 * q, t);
        }
      }
      arrive_as_warp(read + constants_place.slot, lane);
      constants_place.advance();
    }
  }
  // Neither shared memory nor barriers may go while the other thread block still uses them.
  if constexpr (kCluster > 1) {
    cluster.sync();
  }
#endif
}

template <class T, bool kOutliers, int kTokens, int kRows, int kCluster>
void run(const Launch& launch, const Gemm8& p) {
  using Layout = Shape<kOutliers, kTokens, kRows, kCluster>;
  const auto kernel = int8_groups<T, kOutliers, kTokens, kRows, kCluster>;
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), Layout::kBytes);
  constexpr auto kByte = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  const int tokens = tile_share(p.m, ceil_div(p.m, kTokens));
  Maps maps{};
  maps.activations = matrix_map(p.a, kByte, 1, p.m, p.k, tokens, kStep, kSwizzle);
  maps.weight = matrix_map(p.b, kByte, 1, p.n, p.k, Layout::kBoxRows, kStep, kSwizzle);
  if constexpr (kOutliers) {
    constexpr auto kTwoBytes = CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const T* gathered = static_cast<const T*>(p.gathered);
    maps.few_values = matrix_map(gathered + p.n * p.room, kTwoBytes, 2, p.m, p.room, tokens, kOutlierStep, kSwizzle);
    maps.few_codes = matrix_map(gathered, kTwoBytes, 2, p.n, p.room, Layout::kBoxRows, kOutlierStep, kSwizzle);
    maps.picked_codes =
        matrix_map(gathered, kTwoBytes, 2, p.n, p.room, Layout::kBoxRows / kPickers, kOutlierStep, kSwizzle);
    maps.all_values = matrix_map(p.values, kTwoBytes, 2, p.m, p.k, tokens, kOutlierStep, kSwizzle);
    maps.all_codes = matrix_map(p.b, kByte, 1, p.n, p.k, Layout::kBoxRows, kOutlierStep);
  }
  const bool merges = p.outliers.flags != nullptr && product_merges_flags(p.m, p.k, p.cleared);
  const Problem problem{static_cast<int>(p.m),
                        static_cast<int>(p.n),
                        static_cast<int>(p.k),
                        static_cast<int>(p.room),
                        tokens,
                        p.a_absmax,
                        p.b_absmax,
                        p.values,
                        p.cleared ? nullptr : p.a,
                        p.b,
                        p.outliers,
                        merges ? row_flags(p.outliers, p.k) : nullptr,
                        p.gathered,
                        p.bias,
                        p.bias_dtype};
  const int64_t tiles = ceil_div(p.n, kRows) * ceil_div(p.m, kTokens * kCluster);
  launch_dependent(kernel, cluster_grid(launch, tiles, kThreads, Layout::kBytes, kCluster), launch, "int8_linear", maps,
                   problem, static_cast<T*>(p.out));
}

// A tile that the kernel is built for, and what it costs: bytes per column are brought at the rate of 40 per cycle,
// 4096 products are made in one.
struct Tile {
  int tokens, rows;
  bool in_pairs;  // whether two thread blocks share rows of the weight where there are tokens for both

  int64_t cost(int64_t m, int64_t n, int processors) const {
    const int64_t rounds = ceil_div(ceil_div(m, tokens) * ceil_div(n, rows), processors);
    const int64_t moving = (tokens + rows) * int64_t{kStep} / 40, multiplying = int64_t{tokens} * rows * kStep / 4096;
    return rounds * (moving > multiplying ? moving : multiplying);
  }
};

constexpr Tile kTiles[] = {{64, 64, false}, {64, 128, false}, {128, 64, false}, {128, 128, false}, {128, 256, true}};
constexpr int kTileCount = sizeof kTiles / sizeof *kTiles;

int cheapest_tile(int64_t m, int64_t n, int processors) {
  int chosen = 0;
  for (int i = 1; i < kTileCount; ++i) {
    // Of equals the larger tile, which reads less.
    if (kTiles[i].cost(m, n, processors) <= kTiles[chosen].cost(m, n, processors)) {
      chosen = i;
    }
  }
  return chosen;
}

template <class T, bool kOutliers, int kIndex = 0>
void run_tile(int chosen, const Launch& launch, const Gemm8& p) {
  if constexpr (kIndex < kTileCount) {
    if (kIndex != chosen) {
      return run_tile<T, kOutliers, kIndex + 1>(chosen, launch, p);
    }
    constexpr Tile kTile = kTiles[kIndex];
    if constexpr (kTile.in_pairs) {
      if (ceil_div(p.m, kTile.tokens) % 2 == 0) {
        return run<T, kOutliers, kTile.tokens, kTile.rows, 2>(launch, p);
      }
    }
    run<T, kOutliers, kTile.tokens, kTile.rows, 1>(launch, p);
  }
}

}  // namespace

int64_t gathered_room(int64_t k) {
  return ceil_div(ceil_div(k, kGatheredShare), kGatheredMultiple) * kGatheredMultiple;
}

void int8_gemm_groups(const Launch& launch, const Gemm8& p) {
  const int chosen = cheapest_tile(p.m, p.n, launch.processors());
  with_half_dtype(p.dtype, [&](auto type) {
    with_outliers(p, [&](auto outliers) {
      run_tile<typename decltype(type)::type, decltype(outliers)::value>(chosen, launch, p);
    });
  });
  check_launch("int8_linear");
}

}  // namespace bnb_gpu
#endif
