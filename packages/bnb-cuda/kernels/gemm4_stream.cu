// Products of a 4-bit weight with up to 16 rows of activations on compute capabilities 9.0 to 10.x: bound by
// reading the weight.
//
// One thread block lives on each multiprocessor and has a range of tiles of 16 rows of the weight. It takes
// strips of a few tiles, in a strip segments of 2048 columns, in a segment the tiles: the activations of a
// segment stay in registers for all tiles of a strip, and the sums of a strip meet once. A tile of a segment is
// a stage of a ring in shared memory. One warp has bulk copies bring its codes; memory is always busy. A few
// warps bring its statistics and decode nested ones: they run ahead as far as the ring reaches, so that nobody
// waits for a load. Sixteen warps share the columns of a stage and multiply.
//
// While the kernel ahead in the stream is still at work, tables are built and the first codes brought into the
// second-level cache.
#include "barriers.h"
#include "dependent.h"
#include "gemm4.h"

namespace bnb_gpu {
namespace {

constexpr int kWarps = 16;
constexpr int kMathThreads = kWarps * kLanes;
// With one warp for the copies these make 20, as many as share the registers evenly.
constexpr int kScaleWarps = 3;
constexpr int kScaleThreads = kScaleWarps * kLanes;
constexpr int kCopyWarp = kWarps + kScaleWarps;
constexpr int kThreads = (kCopyWarp + 1) * kLanes;
constexpr int kRows = 16;       // of a tile
constexpr int kStripTiles = 4;  // of a strip, at most
constexpr int kStageColumns = 2048;
constexpr int kCodePitch = kStageColumns / 2 + 32;
// Rows of a token's partial sums; neighbouring tokens lie in other banks.
constexpr int kSumPitch = kStripTiles * kRows + 4;
constexpr int kMostStages = 8;

template <int kChunk, int kTokenTiles>
struct SharedLayout {
  static constexpr int kChunks = kStageColumns / kChunk;
  static constexpr int kScalePitch = kChunks + 4;
  static constexpr int kPartialFloats = kWarps * 8 * kTokenTiles * kSumPitch;
  static constexpr int kStageBytes = kRows * (kCodePitch + kScalePitch * 4);
  static constexpr int kPartial = kPairTableBytes;
  static constexpr int kNestedCode = kPartial + kPartialFloats * 4;
  static constexpr int kBarriers = kNestedCode + 256 * 4;
  static constexpr int kRing = kBarriers + 128;
  static constexpr int kFit = (kSharedLimit - kRing) / kStageBytes;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kBytes = kRing + kStages * kStageBytes;
  static_assert(kStages >= 2, "a ring has two stages");
  static_assert(2 * kMostStages * sizeof(uint64_t) <= kRing - kBarriers, "barriers have room");
};

// The stages of a thread block in their order.
struct StageWalk {
  const int end, segments;
  int strip, width, tile = 0, segment = 0;

  __device__ __forceinline__ StageWalk(int first, int end, int segments)
      : end(end), segments(segments), strip(first), width(min(kStripTiles, end - first)) {}

  __device__ __forceinline__ void advance() {
    if (++tile == width) {
      tile = 0;
      if (++segment == segments) {
        segment = 0;
        strip += width;
        width = min(kStripTiles, end - strip);
      }
    }
  }
};

// Activations of one chunk: kChunk / 4 values per lane and token.
template <int kChunk, int kTokenTiles>
struct Activations {
  unsigned words[kTokenTiles][kChunk / 8];
};

// The pair of values of a byte of codes; `table` is the address of the lane's copy of the table in shared memory.
// Written out, for the compiler takes four instructions, and instructions are what is scarce after bytes. It may
// move this beyond barriers: codes must come from loads that follow the barrier after the table is built.
template <int kByte>
__device__ __forceinline__ unsigned pair_of(unsigned table, unsigned word) {
  unsigned pair = 0;
#if BNB_BULK_COPIES
  asm("{\n.reg .b32 byte, entry;\nprmt.b32 byte, %1, 0, %3;\nmad.lo.u32 entry, byte, %4, %2;\n"
      "ld.shared.b32 %0, [entry];\n}\n"
      : "=r"(pair)
      : "r"(word), "r"(table), "n"(0x4440 + kByte), "n"(4 * kLanes));
#endif
  return pair;
}

// The left operand of a product from two bytes, the first of which is kByte, of rows g and g + 8.
template <int kByte>
__device__ __forceinline__ void left_of(unsigned (&left)[4], unsigned table, unsigned upper, unsigned lower) {
  left[0] = pair_of<kByte>(table, upper);
  left[1] = pair_of<kByte>(table, lower);
  left[2] = pair_of<kByte + 1>(table, upper);
  left[3] = pair_of<kByte + 1>(table, lower);
}

template <class T, int kType, bool kNested, int kChunk, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_stream(const T* __restrict__ a, int m, int n, int k, const uint8_t* __restrict__ packed,
                 const Statistics statistics, int block_shift, int nested_shift, const void* __restrict__ bias,
                 int bias_dtype, T* __restrict__ out) {
#if BNB_BULK_COPIES
  using Layout = SharedLayout<kChunk, kTokenTiles>;
  constexpr int kStages = Layout::kStages;
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kLaneBytes = kChunk / 8;              // of a weight row
  constexpr int kLaneValues = kChunk / 4;             // of an activation row
  constexpr int kPerWarp = Layout::kChunks / kWarps;  // chunks of a stage
  constexpr int kParts = Layout::kChunks / kLanes;    // of a stage's statistics, one chunk per lane
  extern __shared__ __align__(128) unsigned char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  uint64_t* drained = full + kStages;
  float* partial = reinterpret_cast<float*>(shared + Layout::kPartial);
  const auto stage_codes = [&](int slot) { return shared + Layout::kRing + slot * Layout::kStageBytes; };
  const auto stage_scales = [&](int slot) { return reinterpret_cast<float*>(stage_codes(slot) + kRows * kCodePitch); };

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int tiles = (n + kRows - 1) / kRows;
  const int share = tiles / static_cast<int>(gridDim.x), rest = tiles % static_cast<int>(gridDim.x);
  const int block = blockIdx.x;
  const int first = block * share + min(block, rest), end = first + share + (block < rest ? 1 : 0);
  const int segments = (k + kStageColumns - 1) / kStageColumns;
  StageWalk walk(first, end, segments);

  if (threadIdx.x == kCopyWarp * kLanes) {
    for (int s = 0; s < kStages; ++s) {
      initialize(full + s, 1 + kParts * kWarpArrivals);
      initialize(drained + s, kWarps * kWarpArrivals);
    }
    publish_barriers();
  }
  // Before everything that takes time, so that memory is busy from the start.
  __syncthreads();

  if (warp == kCopyWarp) {
    const int stages = (end - first) * segments;
    // What this lane copies of a stage, a row; rows that the weight does not have it must not touch.
    const auto codes_of = [&](const StageWalk& at) {
      const int row = (at.strip + at.tile) * kRows;
      return packed + static_cast<int64_t>(row + lane) * k / 2 + at.segment * (kStageColumns / 2);
    };
    const auto bytes_of = [&](const StageWalk& at) { return min(kStageColumns, k - at.segment * kStageColumns) / 2; };
    const auto rows_of = [&](const StageWalk& at) { return min(kRows, n - (at.strip + at.tile) * kRows); };
    StageWalk ahead = walk;
    for (int stage = min(stages, kPrefetchedStages); stage > 0; --stage) {
      if (lane < rows_of(ahead)) {
        prefetch_bulk(codes_of(ahead), bytes_of(ahead));
      }
      ahead.advance();
    }
    wait_for_kernel_ahead();
    let_kernel_behind_begin();
    RingPlace<kStages> place;
    for (int stage = stages; stage > 0; --stage) {
      const int rows = rows_of(walk), bytes = bytes_of(walk);
      wait(drained + place.slot, place.parity ^ 1);
      if (lane == 0) {
        arrive_expecting(full + place.slot, bytes * rows);
      }
      __syncwarp();
      // A lane per row. Of rows that the weight does not have, codes are whatever was there.
      if (lane < rows) {
        copy_bulk(stage_codes(place.slot) + lane * kCodePitch, codes_of(walk), bytes, full + place.slot);
      }
      place.advance();
      walk.advance();
    }
    return;
  }

  if (warp >= kWarps) {
    // Each warp brings every kScaleWarps-th part; the next one is under way while it stores one.
    using Scale = BlockScale<kNested, true>;
    const int scale_warp = warp - kWarps;
    float* code = reinterpret_cast<float*>(shared + Layout::kNestedCode);
    wait_for_kernel_ahead();
    const Scale scale_of(statistics, code, nested_shift, scale_warp * kLanes + lane, kScaleThreads);
    typename Scale::Stored raw[2][kRows];
    int part = 0;
    const auto fetch = [&](int slot) {
      const int column = walk.segment * kStageColumns + (kLanes * part + lane) * kChunk;
      const int row = (walk.strip + walk.tile) * kRows;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        raw[slot][r] = {};
        if (column < k) {
          raw[slot][r] = scale_of.fetch((static_cast<int64_t>(min(row + r, n - 1)) * k + column) >> block_shift);
        }
      }
    };
    const auto next_part = [&](auto& at, int& at_part, int parts) {
      for (int p = 0; p < parts; ++p) {
        if (++at_part == kParts) {
          at_part = 0;
          at.advance();
        }
      }
    };
    RingPlace<kStages> place;
    int place_part = 0;
    next_part(walk, part, scale_warp);
    next_part(place, place_part, scale_warp);
    int left = (end - first) * segments * kParts - scale_warp;
    if (left > 0) {
      fetch(0);
    }
    if (kNested) {
      synchronize_some(2, kScaleThreads);
    }
    while (left > 0) {
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        if (left > 0) {
          next_part(walk, part, kScaleWarps);
          if (left > kScaleWarps) {
            fetch(1 - d);
          }
          wait(drained + place.slot, place.parity ^ 1);
          float* to = stage_scales(place.slot) + kLanes * place_part + lane;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            to[r * Layout::kScalePitch] = scale_of.value(raw[d][r]);
          }
          arrive_as_warp(full + place.slot, lane);
          next_part(place, place_part, kScaleWarps);
          left -= kScaleWarps;
        }
      }
    }
    return;
  }

  const int g = lane / 4, t = lane % 4;
  const unsigned table = shared_address(shared) + 4 * lane;

  using Right = Activations<kChunk, kTokenTiles>;
  Right values[kPerWarp];
  // Activations of this warp's chunks of a segment. Chunks beyond the last column get zeros.
  const auto load_activations = [&](int segment) {
#pragma unroll
    for (int c = 0; c < kPerWarp; ++c) {
      const int column = segment * kStageColumns + (kWarps * c + warp) * kChunk;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = 8 * j + g;
        const uint4* from =
            reinterpret_cast<const uint4*>(a + static_cast<int64_t>(token) * k + column + t * kLaneValues);
#pragma unroll
        for (int q = 0; q < kLaneValues / 8; ++q) {
          const uint4 four = token < m && column < k ? from[q] : make_uint4(0, 0, 0, 0);
          values[c].words[j][4 * q] = four.x;
          values[c].words[j][4 * q + 1] = four.y;
          values[c].words[j][4 * q + 2] = four.z;
          values[c].words[j][4 * q + 3] = four.w;
        }
      }
    }
  };

  float sums[kStripTiles][kTokenTiles][4] = {};
  // Chunks that are multiplied together, each with two sums: short chains of products, much to overlap.
  constexpr int kTogether = kTokenTiles == 1 ? 2 : 1, kChains = kTokenTiles == 1 ? 2 : 1;
  const auto multiply = [&](float (&sum)[kTokenTiles][4], int slot, int chunk, const Right* right) {
    const unsigned char* from = stage_codes(slot) + g * kCodePitch + chunk * (kChunk / 2) + t * kLaneBytes;
    const float* scales = stage_scales(slot) + g * Layout::kScalePitch + chunk;
    Codes<kChunk> codes[kTogether][2];
    float scale[kTogether][2];
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 8 * h, other = kWarps * c;
        memcpy(&codes[c][h], __builtin_assume_aligned(from + row * kCodePitch + other * (kChunk / 2), kLaneBytes),
               kLaneBytes);
        scale[c][h] = scales[row * Layout::kScalePitch + other];
      }
    }
    float block[kTogether][kChains][kTokenTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) {
#pragma unroll
      for (int c = 0; c < kTogether; ++c) {
        const unsigned upper = codes[c][0].words[i / 2], lower = codes[c][1].words[i / 2];
        unsigned left[4];
        i % 2 == 0 ? left_of<0>(left, table, upper, lower) : left_of<2>(left, table, upper, lower);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          multiply_tile<T>(block[c][i % kChains][j], left, right[c].words[j][2 * i], right[c].words[j][2 * i + 1]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float chunk_sum = kChains == 2 ? block[c][0][j][i] + block[c][kChains - 1][j][i] : block[c][0][j][i];
          sum[j][i] = __fmaf_rn(chunk_sum, scale[c][i / 2], sum[j][i]);
        }
      }
    }
  };

  // Sums of a strip over the warps. Lane (g, t) holds rows g and g + 8, tokens 2 t and 2 t + 1 of each tile.
  const auto finish_strip = [&](int strip, int width) {
    if (strip != first) {
      // Until all have read those of the strip before.
      synchronize_some(1, kMathThreads);
    }
#pragma unroll
    for (int r = 0; r < kStripTiles; ++r) {
      if (r < width) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = kRows * r + 8 * (i / 2) + g, token = 8 * j + 2 * t + i % 2;
            partial[(warp * kTokens + token) * kSumPitch + row] = sums[r][j][i];
            sums[r][j][i] = 0.0f;
          }
        }
      }
    }
    synchronize_some(1, kMathThreads);
    constexpr int kCells = kStripTiles * kRows;  // of a token
#pragma unroll 1
    for (int cell = threadIdx.x; cell < kCells * m; cell += kMathThreads) {
      const int token = cell / kCells, row = cell % kCells, place = strip * kRows + row;
      if (row < width * kRows && place < n) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          sum += partial[(w * kTokens + token) * kSumPitch + row];
        }
        out[token * static_cast<int64_t>(n) + place] = from_float<T>(sum + load_bias(bias, bias_dtype, place));
      }
    }
  };

  build_pair_table<T, kType>(reinterpret_cast<unsigned*>(shared));
  wait_for_kernel_ahead();
  a = after_wait(a);
  bias = after_wait(bias);
  load_activations(0);
  synchronize_some(1, kMathThreads);
  RingPlace<kStages> place;
  for (int strip = first; strip < end; strip += kStripTiles) {
    const int width = min(kStripTiles, end - strip);
    for (int segment = 0; segment < segments; ++segment) {
#pragma unroll
      for (int r = 0; r < kStripTiles; ++r) {
        if (r < width) {
          wait(full + place.slot, place.parity);
#pragma unroll
          for (int c = 0; c < kPerWarp; c += kTogether) {
            const int chunk = kWarps * c + warp;
            // Of chunks beyond the last column codes are whatever was there, activations are zero.
            if (segment * kStageColumns + chunk * kChunk < k) {
              multiply(sums[r], place.slot, chunk, values + c);
            }
          }
          arrive_as_warp(drained + place.slot, lane);
          place.advance();
        }
      }
      load_activations(segment + 1 < segments ? segment + 1 : 0);
    }
    finish_strip(strip, width);
  }
#endif
}

template <class T, int kType, bool kNested, int kChunk, int kTokenTiles>
void run(const Launch& launch, const Gemm4& p) {
  const auto kernel = gemm4_stream<T, kType, kNested, kChunk, kTokenTiles>;
  constexpr int kShared = SharedLayout<kChunk, kTokenTiles>::kBytes;
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), kShared);
  launch_dependent(kernel, {dim3(launch.grid(ceil_div(p.n, kRows), 1)), kThreads, kShared}, launch, "gemm_4bit",
                   static_cast<const T*>(p.a), static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k),
                   p.packed, p.statistics, exact_log2(p.blocksize), exact_log2(p.statistics.nested_blocksize), p.bias,
                   p.bias_dtype, static_cast<T*>(p.out));
}

}  // namespace

void gemm_4bit_stream(const Launch& launch, const Gemm4& p) {
  with_half_dtype(p.dtype, [&](auto type) {
    with_quant_type(p.quant_type, [&](auto quant) {
      with_nested(p.statistics, [&](auto nested) {
        with_chunk(p.blocksize, [&](auto chunk) {
          using T = typename decltype(type)::type;
          constexpr int kType = decltype(quant)::value, kChunk = decltype(chunk)::value;
          constexpr bool kNested = decltype(nested)::value;
          p.m <= 8 ? run<T, kType, kNested, kChunk, 1>(launch, p) : run<T, kType, kNested, kChunk, 2>(launch, p);
        });
      });
    });
  });
  check_launch("gemm_4bit");
}

}  // namespace bnb_gpu
