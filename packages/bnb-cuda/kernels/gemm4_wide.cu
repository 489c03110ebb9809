// Products of a 4-bit weight with very many rows of activations on compute capability 9.0.
//
// A thread block computes tiles of 128 rows of the weight times 256 rows of activations, in turn. Where the tiles left
// for the last round are so few that most multiprocessors would wait for them, they are computed in halves of 128
// rows of activations. One warp has the copy engine bring codes and activations into a ring in shared memory, 64
// columns per stage; the two thread blocks of a cluster work on the same activations, of which each brings one half for
// both. Two groups of four warps have 64 rows of the weight each. They decode codes into registers, rounded like a
// dequantized weight, half a stage while the matrix units multiply the half before: every decoded value meets 256 rows
// of activations.
#include <type_traits>

#include "clusters.h"
#include "gemm4.h"
#include "tensor_map.h"
#include "wgmma.h"

#ifndef BNB_HIP
#include <cooperative_groups.h>

namespace bnb_gpu {
namespace {

constexpr int kMathThreads = 2 * kGroupThreads;
constexpr int kMathWarps = kMathThreads / kLanes;
constexpr int kThreads = kMathThreads + kGroupThreads;
constexpr int kRows = 128, kTokens = 256;
constexpr int kChunk = 64;  // columns of a stage
constexpr int kHalf = kChunk / 2;
constexpr int kProducts = kHalf / 16;
constexpr int kCluster = 2;
constexpr int kShare = kTokens / kCluster;  // rows of activations that a thread block brings for a tile, at most
constexpr int kCodePitch = kChunk / 2;
constexpr int kTokenBytes = kTokens * kSwizzledRowBytes;
constexpr int kStageBytes = kTokenBytes + kRows * kCodePitch;
constexpr int kStages = 4;
// Pairs of values by byte, one copy for every other lane: 16 lanes read 8 bytes each at a time. The pitch of a spread
// table lets one instruction make an address of a byte.
constexpr int kCopies = kLanes / 2;
constexpr int kTable = kStages * kStageBytes;
constexpr int kNestedCode = kTable + kSpreadTableBytes;
constexpr int kBarriers = kNestedCode + 256 * 4;
constexpr int kSharedBytes = kBarriers + 256;
static_assert(kStages == 4, "the lanes that share rows hold the statistics of a pass through the ring");
static_assert(kSharedBytes <= kSharedLimit, "more shared memory than a thread block can have");

struct Problem {
  int m, n, k;
  int whole;  // tiles that are not halved
  int share;  // rows of activations that a thread block brings for a tile, and of half a tile
  int block_shift, nested_shift;
  const void* bias;
  int bias_dtype;
};

template <int kType>
__device__ __forceinline__ void build_value_table(unsigned char* table) {
  for (int i = threadIdx.x; i < 256 * kCopies; i += kThreads) {
    const int byte = i / kCopies;
    float2* row = reinterpret_cast<float2*>(table + byte * kSpreadTablePitch);
    row[i % kCopies] = make_float2(Tables4<kType>::value(byte / 16), Tables4<kType>::value(byte % 16));
  }
}

// Turns an 8 x 8 matrix of 16-bit numbers around, of which each lane has two neighbours of a row.
__device__ __forceinline__ unsigned transposed(unsigned pair) {
  unsigned turned = 0;
#if BNB_WGMMA
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
#endif
  return turned;
}

// Writes 16 neighbouring columns of eight rows of the result. `upper`, `lower`: columns g and g + 8 of the lane's
// two rows; afterwards a lane has four neighbours of one row, which it writes if it comes before `end_token`.
template <class T>
__device__ __forceinline__ void store_columns(T* out, const Problem& p, unsigned upper, unsigned lower, int token,
                                              int end_token, int column, int lane) {
  const int t = lane % 4;
  const unsigned first = transposed(upper), second = transposed(lower);
  const bool odd = t % 2 != 0;
  const unsigned got = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  const int own_token = token + lane / 4, own_column = column + (odd ? 8 : 0) + t / 2 * 4;
  const unsigned words[2] = {odd ? got : first, odd ? second : got};
  if (own_token >= end_token) {
    return;
  }
  T* to = out + static_cast<int64_t>(own_token) * p.n + own_column;
  if (p.n % 4 == 0) {
    if (own_column < p.n) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    }
    return;
  }
  T four[4];
  memcpy(four, words, sizeof four);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (own_column + i < p.n) {
      to[i] = four[i];
    }
  }
}

// The same value, of which the compiler does not know how it came about: it would work it out anew in each loop, from
// special registers that take long to read.
__device__ __forceinline__ int kept(int value, int lane) { return shuffle(value, lane); }

template <class T, int kType, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_wide(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap weight,
               const Problem p, const Statistics statistics, T* __restrict__ out) {
#if BNB_WGMMA
  using Scale = BlockScale<kNested, true>;
  extern __shared__ __align__(1024) unsigned char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + kBarriers);
  uint64_t* drained = full + kStages;

  const int rank = static_cast<int>(blockIdx.x) % kCluster;
  const int token_tiles = (p.m + kTokens - 1) / kTokens;
  const int tiles = (p.n + kRows * kCluster - 1) / (kRows * kCluster) * token_tiles;
  // Tiles and halves are numbered in the order in which clusters take them.
  const int pieces = p.whole + 2 * (tiles - p.whole);
  const int first_piece = static_cast<int>(blockIdx.x) / kCluster, stride = static_cast<int>(gridDim.x) / kCluster;
  const int steps = (p.k + kChunk - 1) / kChunk;
  const auto is_half = [&](int piece) { return piece >= p.whole; };
  const auto tile_of = [&](int piece) { return is_half(piece) ? p.whole + (piece - p.whole) / 2 : piece; };
  // Neighbouring clusters share rows of the weight, which then stay in the cache.
  const auto token_of = [&](int piece) {
    return (tile_of(piece) % token_tiles * kCluster + (is_half(piece) ? (piece - p.whole) % 2 : 0)) * p.share;
  };
  const auto row_of = [&](int piece) { return (tile_of(piece) / token_tiles * kCluster + rank) * kRows; };
  const int warp = threadIdx.x / kLanes;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      initialize(full + s, 1);
      initialize(drained + s, kMathWarps * kCluster);
    }
    publish_barriers();
    for (int step = 0; step < min(steps, kPrefetchedStages); ++step) {
      prefetch_box(weight, step * kCodePitch, row_of(first_piece));
    }
  }
  build_value_table<kType>(shared + kTable);
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  const Scale scale_of(statistics, reinterpret_cast<float*>(shared + kNestedCode), p.nested_shift);
  auto cluster = cooperative_groups::this_cluster();
  cluster.sync();

  if (warp >= kMathWarps) {
    keep_fewer_registers<40>();
    if (warp == kMathWarps && threadIdx.x % kLanes == 0) {
      const int share_bytes = p.share * kSwizzledRowBytes;
      RingParities parities;
      for (int piece = first_piece; piece < pieces; piece += stride) {
        // Of a half, which is one share, the thread blocks bring every other stage.
        const bool half = is_half(piece);
        const int share = half ? 0 : rank, bytes = kStageBytes - kTokenBytes + (half ? 1 : kCluster) * share_bytes;
        const int token = token_of(piece) + share * p.share, row = row_of(piece);
        for (int step = 0; step < steps; ++step) {
          // Every piece begins with the first slot.
          const int slot = step % kStages;
          unsigned char* stage = shared + slot * kStageBytes;
          uint64_t* barrier = full + slot;
          wait(drained + slot, parities.next(slot) ^ 1);
          arrive_expecting(barrier, bytes);
          if (!half || step % kCluster == rank) {
            copy_box_to((1 << kCluster) - 1, stage + share * share_bytes, activations, step * kChunk, token, barrier);
          }
          copy_box(stage + kTokenBytes, weight, step * kCodePitch, row, barrier);
        }
      }
    }
    __syncwarp();
  } else {
    take_more_registers<232>();
    const int lane = kept(static_cast<int>(threadIdx.x) % kLanes, static_cast<int>(threadIdx.x) % kLanes);
    const int g = lane / 4, t = lane % 4;
    const int warp_row = warp * 16, own_row = warp_row + g;
    const unsigned selector = spread_selector(t), lane_offset = lane % kCopies * 8;
    const uint64_t first_right = tile_descriptor(shared);
    const StageRelease<kCluster> release(drained, lane);
    // The copy engine swaps the halves of the codes of every second four rows.
    int own_codes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own_codes[half] = kept(kTokenBytes + own_row * kCodePitch + (half ^ (g >> 2)) * (kCodePitch / 2), lane);
    }
    RingParities parities;
    const auto multiply_piece = [&](int piece, auto tokens) {
      float sums[decltype(tokens)::value / 2];
      // The left operands of both halves of a stage: one is decoded while the other one is multiplied.
      unsigned left[2][kProducts][4];
      const int first_row = row_of(piece), first_token = token_of(piece);
      const int end_token = min(first_token + decltype(tokens)::value / kShare * p.share, p.m);
      int64_t row_begin[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_begin[h] = static_cast<int64_t>(min(first_row + own_row + 8 * h, p.n - 1)) * p.k;
      }
      // Statistics of four stages at a time, one per lane of four, and those of the next four on their way.
      typename Scale::Stored coming[2];
      float current[2], scale[2], next_scale[2];
      const auto fetch_scales = [&](int step) {
        const int column = min((step + t) * kChunk, p.k - 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          coming[h] = scale_of.fetch((row_begin[h] + column) >> p.block_shift);
        }
      };
      const auto take_scales = [&](int step) {
        if (step % kStages == 0) {
          current[0] = scale_of.value(coming[0]);
          current[1] = scale_of.value(coming[1]);
        }
        const int from = (lane & ~3) | step % kStages;
        next_scale[0] = shuffle(current[0], from);
        next_scale[1] = shuffle(current[1], from);
      };
      // What a stage goes through on its way into the left operands, by half.
      unsigned codes[2][2][4];
      float2 pairs[2][kProducts][4];
      const auto load_codes = [&](int slot) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint4 four =
                *reinterpret_cast<const uint4*>(shared + own_codes[half] + slot * kStageBytes + h * 8 * kCodePitch);
            codes[half][h][0] = four.x;
            codes[half][h][1] = four.y;
            codes[half][h][2] = four.z;
            codes[half][h][3] = four.w;
          }
        }
      };
      const auto look_up = [&](int half) {
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            pairs[half][i][j] =
                decode_spread<float2>(shared + kTable, lane_offset, codes[half][j % 2][2 * i + j / 2], selector);
          }
        }
      };
      const auto round_pairs = [&](int half) {
        if (half == 0) {
          scale[0] = next_scale[0];
          scale[1] = next_scale[1];
        }
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            left[half][i][j] = pack_pair<T>(pairs[half][i][j].x * scale[j % 2], pairs[half][i][j].y * scale[j % 2]);
          }
        }
      };
      const auto multiply_half = [&](int half, int slot, bool add) {
        const uint64_t right = first_right + static_cast<uint64_t>(slot * (kStageBytes / 16));
        begin_products();
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          multiply_group<T>(sums, left[half][i], right + 2 * (half * kProducts + i), add || half + i > 0);
        }
        commit_products();
      };

      // Codes of a stage are read while the one before it is multiplied in whole, and looked up half by half.
      const auto load_stage = [&](int slot, bool exists) {
        if (exists) {
          wait(full + slot, parities.next(slot));
          load_codes(slot);
        }
      };
      fetch_scales(0);
      take_scales(0);
      fetch_scales(kStages);
      load_stage(0, true);
      look_up(0);
      look_up(1);
      load_stage(1, steps > 1);
      round_pairs(0);
      for (int first = 0; first < steps; first += kStages) {
        // Written out for all slots, which are constants then. What is on its way moves to no other register, which
        // would have to wait for it.
#pragma unroll
        for (int j = 0; j < kStages; ++j) {
          const int step = first + j;
          if (step >= steps) {
            break;
          }
          // A scheduler has only two warps, one of each group, which hide little latency: whatever comes from shared
          // memory, which the matrix units keep busy, is asked for half a stage ahead of its use at least.
          multiply_half(0, j, j > 0 || first > 0);
          if (step + 1 < steps) {
            take_scales(j + 1);
            look_up(0);
          }
          wait_for_products_but<1>();
          if (j > 0 || first > 0) {
            release((j + kStages - 1) % kStages);
          }
          round_pairs(1);
          multiply_half(1, j, true);
          if (step + 1 < steps) {
            if (j + 1 == kStages) {
              fetch_scales(step + 1 + kStages);
            }
            look_up(1);
            load_stage((j + 2) % kStages, step + 2 < steps);
          }
          wait_for_products_but<1>();
          if (step + 1 < steps) {
            round_pairs(0);
          }
        }
      }
      wait_for_products(sums);
      release((steps - 1) % kStages);

      float bias[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + own_row + 8 * h;
        bias[h] = load_bias(row < p.n ? p.bias : nullptr, p.bias_dtype, row);
      }
#pragma unroll
      for (int j = 0; j < decltype(tokens)::value / 8; ++j) {
        const unsigned upper = pack_pair<T>(sums[4 * j] + bias[0], sums[4 * j + 1] + bias[0]);
        const unsigned lower = pack_pair<T>(sums[4 * j + 2] + bias[1], sums[4 * j + 3] + bias[1]);
        store_columns(out, p, upper, lower, first_token + 8 * j, end_token, first_row + warp_row, lane);
      }
    };
    int piece = first_piece;
    for (; piece < p.whole; piece += stride) {
      multiply_piece(piece, std::integral_constant<int, kTokens>{});
    }
    if (piece < pieces) {
      multiply_piece(piece, std::integral_constant<int, kTokens / 2>{});
    }
  }
  // Neither shared memory nor barriers may go while the other thread block still uses them.
  cluster.sync();
#endif
}

template <class T, int kType, bool kNested>
void run(const Launch& launch, const Gemm4& p) {
  const auto kernel = gemm4_wide<T, kType, kNested>;
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), kSharedBytes);
  const int share = tile_share(p.m, kCluster * ceil_div(p.m, kTokens));
  const CUtensorMap activations =
      matrix_map(p.a, tensor_map_type<T>(), 2, p.m, p.k, share, kChunk, CU_TENSOR_MAP_SWIZZLE_128B);
  const CUtensorMap weight = matrix_map(p.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.n, p.k / 2, kRows, kCodePitch,
                                        CU_TENSOR_MAP_SWIZZLE_32B);
  const int64_t tiles = ceil_div(p.n, kRows * kCluster) * ceil_div(p.m, kTokens);
  const int64_t clusters = launch.processors() / kCluster, last_round = tiles % clusters;
  const int64_t halved = 2 * last_round <= clusters ? last_round : 0;
  const Problem problem{static_cast<int>(p.m),
                        static_cast<int>(p.n),
                        static_cast<int>(p.k),
                        static_cast<int>(tiles - halved),
                        share,
                        exact_log2(p.blocksize),
                        exact_log2(p.statistics.nested_blocksize),
                        p.bias,
                        p.bias_dtype};
  launch_dependent(kernel, cluster_grid(launch, tiles + halved, kThreads, kSharedBytes, kCluster), launch, "gemm_4bit",
                   activations, weight, problem, p.statistics, static_cast<T*>(p.out));
}

}  // namespace

void gemm_4bit_wide(const Launch& launch, const Gemm4& p) {
  with_half_dtype(p.dtype, [&](auto type) {
    with_quant_type(p.quant_type, [&](auto quant) {
      with_nested(p.statistics, [&](auto nested) {
        run<typename decltype(type)::type, decltype(quant)::value, decltype(nested)::value>(launch, p);
      });
    });
  });
  check_launch("gemm_4bit");
}

}  // namespace bnb_gpu
#endif
