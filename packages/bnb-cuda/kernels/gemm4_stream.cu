// Products of a 4-bit weight with up to 16 rows of activations on compute capabilities 9.0 to 10.x: bound by
// reading the weight.
//
// One thread block lives on each multiprocessor and has a range of tiles of 16 rows of the weight. It takes
// strips of a few tiles, in a strip segments of 1024 or 2048 columns, in a segment the tiles: the activations of a
// segment stay in registers for all tiles of a strip, and the sums of a strip meet once. A tile of a segment is
// a stage of a ring in shared memory. One lane has the copy engine bring its codes, all at once; memory is always
// busy. A few warps bring its statistics and decode nested ones: they run ahead as far as the ring reaches, so that
// nobody waits for a load. Sixteen warps share the columns of a stage and multiply.
//
// The copy engine lays codes out in boxes of 16 rows of 128 bytes, the 16 bytes of a unit exchanged within a row so
// that neighbouring rows have theirs in other banks.
//
// While the kernel ahead in the stream is still at work, tables are built and the first codes brought into the
// second-level cache.
#include "barriers.h"
#include "dependent.h"
#include "gemm4.h"
#include "tensor_map.h"

#ifndef BNB_HIP

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
constexpr int kBoxRowBytes = 128;
constexpr int kBoxBytes = kRows * kBoxRowBytes;
constexpr int kUnitBytes = 16;
// Rows of a token's partial sums; neighbouring tokens lie in other banks.
constexpr int kSumPitch = kStripTiles * kRows + 4;
// More columns would only lengthen the queue before memory, in which activations and statistics wait (3, 4, 5 and 8
// stages of 2048 measured).
constexpr int kMostColumns = 3 * 2048;

template <int kChunk, int kTokenTiles>
struct SharedLayout {
  // Twice the activations take as many registers in half the columns.
  static constexpr int kStageColumns = 2048 / kTokenTiles;
  static constexpr int kStageBoxes = kStageColumns / 2 / kBoxRowBytes;
  static constexpr int kMostStages = kMostColumns / kStageColumns;
  static constexpr int kChunks = kStageColumns / kChunk;
  // A warp brings statistics of so many chunks of all rows of a stage, each lane those of 4 neighbouring chunks of
  // some.
  static constexpr int kPartChunks = kChunks < kLanes ? kChunks : kLanes;
  static constexpr int kParts = kChunks / kPartChunks;
  static constexpr int kQuadsPerRow = kPartChunks / 4;
  static constexpr int kQuads = kRows * kQuadsPerRow / kLanes;
  static constexpr int kScalePitch = kChunks + 4;
  static constexpr int kPartialFloats = kWarps * 8 * kTokenTiles * kSumPitch;
  static constexpr int kCodeBytes = kStageBoxes * kBoxBytes, kScaleBytes = kRows * kScalePitch * 4;
  static constexpr int kStageBytes = kCodeBytes + kScaleBytes;
  static constexpr int kPartial = kSpreadTableBytes;
  static constexpr int kNestedCode = kPartial + kPartialFloats * 4;
  static constexpr int kBarriers = kNestedCode + 256 * 4;
  static constexpr int kBarrierBytes = 2 * kMostStages * sizeof(uint64_t);
  static constexpr int kRing = (kBarriers + kBarrierBytes + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;
  static constexpr int kFit = (kSharedLimit - kRing) / kStageBytes;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kScales = kRing + kStages * kCodeBytes;
  static constexpr int kBytes = kScales + kStages * kScaleBytes;
  static_assert(kStages >= 2, "a ring has two stages");
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

// The left operand of a product from two bytes, the first of which is kByte, of rows g and g + 8.
template <int kByte>
__device__ __forceinline__ void left_of(unsigned (&left)[4], const unsigned char* table, unsigned lane_offset,
                                        unsigned upper, unsigned lower) {
  left[0] = decode_spread(table, lane_offset, upper, spread_selector(kByte));
  left[1] = decode_spread(table, lane_offset, lower, spread_selector(kByte));
  left[2] = decode_spread(table, lane_offset, upper, spread_selector(kByte + 1));
  left[3] = decode_spread(table, lane_offset, lower, spread_selector(kByte + 1));
}

// absmax of 4 neighbouring chunks, the first of them a multiple of 4. The nested block size is 4 at least.
template <bool kNested>
struct ScaleQuad {
  using Scale = BlockScale<kNested, true>;
  const Scale scale;
  int block_shift;

  __device__ __forceinline__ ScaleQuad(const Statistics& statistics, float* code, int block_shift, int nested_shift,
                                       int thread, int threads)
      : scale(statistics, code, nested_shift, thread, threads), block_shift(block_shift) {}

  // As memory holds them: four numbers, or four codes and the absmax that they share.
  struct Nested {
    unsigned codes;
    float absmax;
  };
  using Stored = std::conditional_t<kNested, Nested, float4>;

  // `value`: the place of the first of the weight's values. A chunk is a block, or blocks are larger.
  template <int kChunk>
  __device__ __forceinline__ Stored fetch(int64_t value) const {
    const bool is_dense = (1 << block_shift) == kChunk;
    const auto block_of = [&](int j) { return (value + j * kChunk) >> block_shift; };
    const Statistics& from = scale.statistics;
    if constexpr (kNested) {
      Nested result;
      result.absmax = from.absmax[block_of(0) >> scale.nested_shift];
      if (is_dense) {
        result.codes = *reinterpret_cast<const unsigned*>(from.absmax_8bit + block_of(0));
      } else {
        result.codes = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          result.codes |= static_cast<unsigned>(from.absmax_8bit[block_of(j)]) << (8 * j);
        }
      }
      return result;
    } else if (is_dense) {
      return *reinterpret_cast<const float4*>(from.absmax + block_of(0));
    } else {
      return make_float4(from.absmax[block_of(0)], from.absmax[block_of(1)], from.absmax[block_of(2)],
                         from.absmax[block_of(3)]);
    }
  }

  __device__ __forceinline__ float4 values(const Stored& stored) const {
    if constexpr (kNested) {
      const auto value = [&](int j) { return scale.value({stored.absmax, stored.codes >> (8 * j) & 0xffu}); };
      return make_float4(value(0), value(1), value(2), value(3));
    } else {
      return stored;
    }
  }
};

template <class T, int kType, bool kNested, int kChunk, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_stream(const T* __restrict__ a, int m, int n, int k, const __grid_constant__ CUtensorMap weight,
                 const Statistics statistics, int block_shift, int nested_shift, const void* __restrict__ bias,
                 int bias_dtype, T* __restrict__ out) {
#if BNB_BULK_COPIES
  using Layout = SharedLayout<kChunk, kTokenTiles>;
  constexpr int kStages = Layout::kStages, kStageColumns = Layout::kStageColumns, kStageBoxes = Layout::kStageBoxes;
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kLaneBytes = kChunk / 8;              // of a weight row
  constexpr int kLaneValues = kChunk / 4;             // of an activation row
  constexpr int kPerWarp = Layout::kChunks / kWarps;  // chunks of a stage
  constexpr int kParts = Layout::kParts, kQuadsPerRow = Layout::kQuadsPerRow, kQuads = Layout::kQuads;
  constexpr int kPrefetched = kStages < kPrefetchedStages ? kStages : kPrefetchedStages;
  extern __shared__ __align__(kBoxAlignment) unsigned char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  uint64_t* drained = full + kStages;
  float* partial = reinterpret_cast<float*>(shared + Layout::kPartial);
  const auto stage_codes = [&](int slot) { return shared + Layout::kRing + slot * Layout::kCodeBytes; };
  const auto stage_scales = [&](int slot) {
    return reinterpret_cast<float*>(shared + Layout::kScales + slot * Layout::kScaleBytes);
  };

  // The warp is the same in all lanes, as the compiler learns by this; it then keeps addresses that are so in registers
  // of their own and adds them for nothing.
  const int lane = threadIdx.x % kLanes, warp = shuffle(static_cast<int>(threadIdx.x) / kLanes, 0);
  const int tiles = (n + kRows - 1) / kRows;
  const int share = tiles / static_cast<int>(gridDim.x), rest = tiles % static_cast<int>(gridDim.x);
  const int block = blockIdx.x;
  const int first = block * share + min(block, rest), end = first + share + (block < rest ? 1 : 0);
  const int segments = (k + kStageColumns - 1) / kStageColumns;
  StageWalk walk(first, end, segments);

  if (threadIdx.x == kCopyWarp * kLanes) {
    prefetch_map(weight);
    for (int s = 0; s < kStages; ++s) {
      initialize(full + s, 1 + kParts * kWarpArrivals);
      initialize(drained + s, kWarps * kWarpArrivals);
    }
    publish_barriers();
  }
  // Before everything that takes time, so that memory is busy from the start.
  __syncthreads();

  if (warp == kCopyWarp) {
    if (lane != 0) {
      return;
    }
    const int stages = (end - first) * segments;
    const auto box_of = [&](const StageWalk& at) { return at.segment * kStageBoxes; };
    const auto row_of = [&](const StageWalk& at) { return (at.strip + at.tile) * kRows; };
    StageWalk ahead = walk;
    for (int stage = min(stages, kPrefetched); stage > 0; --stage) {
      prefetch_boxes(weight, row_of(ahead), box_of(ahead));
      ahead.advance();
    }
    wait_for_kernel_ahead();
    let_kernel_behind_begin();
    RingPlace<kStages> place;
    for (int stage = stages; stage > 0; --stage) {
      wait(drained + place.slot, place.parity ^ 1);
      arrive_expecting(full + place.slot, Layout::kCodeBytes);
      copy_boxes(stage_codes(place.slot), weight, row_of(walk), box_of(walk), full + place.slot);
      place.advance();
      walk.advance();
    }
    return;
  }

  if (warp >= kWarps) {
    // Each warp brings every kScaleWarps-th part; the next one is under way while it stores one.
    using Quad = ScaleQuad<kNested>;
    const int scale_warp = warp - kWarps;
    float* code = reinterpret_cast<float*>(shared + Layout::kNestedCode);
    wait_for_kernel_ahead();
    const Quad quad(statistics, code, block_shift, nested_shift, scale_warp * kLanes + lane, kScaleThreads);
    typename Quad::Stored raw[2][kQuads];
    int part = 0;
    // Neighbouring lanes have neighbouring quads of chunks.
    const auto row_of = [&](int q) { return (q * kLanes + lane) / kQuadsPerRow; };
    const int first_chunk = lane % kQuadsPerRow * 4;
    const auto fetch = [&](int slot) {
      const int column = walk.segment * kStageColumns + (Layout::kPartChunks * part + first_chunk) * kChunk;
      const int row = (walk.strip + walk.tile) * kRows;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        raw[slot][q] = {};
        if (column < k) {
          raw[slot][q] = quad.template fetch<kChunk>(static_cast<int64_t>(min(row + row_of(q), n - 1)) * k + column);
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
          float* to = stage_scales(place.slot) + Layout::kPartChunks * place_part + first_chunk;
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            *reinterpret_cast<float4*>(to + row_of(q) * Layout::kScalePitch) = quad.values(raw[d][q]);
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
  // The row of a tile that is this lane's as the g-th, and the one 8 below: lanes that read together have other banks.
  const int own_row = 2 * (g % 4) + g / 4;
  const unsigned lane_offset = 4 * lane;

  using Right = Activations<kChunk, kTokenTiles>;
  Right values[kPerWarp];
  // Those of the next segment are on their way while one is multiplied. (By way of shared memory they take longer,
  // measured.) Chunks beyond the last column get zeros.
  const auto load_activations = [&](Right(&into)[kPerWarp], int segment) {
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
          into[c].words[j][4 * q] = four.x;
          into[c].words[j][4 * q + 1] = four.y;
          into[c].words[j][4 * q + 2] = four.z;
          into[c].words[j][4 * q + 3] = four.w;
        }
      }
    }
  };

  float sums[kStripTiles][kTokenTiles][4] = {};
  // Chunks that are multiplied together, each with two sums: short chains of products, much to overlap.
  constexpr int kTogether = kTokenTiles == 1 ? 2 : 1, kChains = kTokenTiles == 1 ? 2 : 1;
  const auto multiply = [&](float (&sum)[kTokenTiles][4], int slot, int chunk, const Right* right) {
    constexpr int kApart = kWarps * (kChunk / 2);  // bytes of a row between the chunks of a warp
    static_assert(kApart % kBoxRowBytes == 0, "a warp's chunks lie alike in their boxes");
    const int byte = chunk * (kChunk / 2) + t * kLaneBytes, in_row = byte % kBoxRowBytes;
    const unsigned char* from = stage_codes(slot) + byte / kBoxRowBytes * kBoxBytes + own_row * kBoxRowBytes +
                                ((in_row / kUnitBytes) ^ own_row) * kUnitBytes + in_row % kUnitBytes;
    const float* scales = stage_scales(slot) + own_row * Layout::kScalePitch + chunk;
    Codes<kChunk> codes[kTogether][2];
    float scale[kTogether][2];
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 8 * h, other = kWarps * c;
        const unsigned char* place = from + row * kBoxRowBytes + c * (kApart / kBoxRowBytes) * kBoxBytes;
        memcpy(&codes[c][h], __builtin_assume_aligned(place, kLaneBytes), kLaneBytes);
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
        i % 2 == 0 ? left_of<0>(left, shared, lane_offset, upper, lower)
                   : left_of<2>(left, shared, lane_offset, upper, lower);
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

  // Sums of a strip over the warps. Lane (g, t) holds its row and the one 8 below, tokens 2 t and 2 t + 1 of each tile.
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
            const int row = kRows * r + 8 * (i / 2) + own_row, token = 8 * j + 2 * t + i % 2;
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

  build_pair_table<T, kType, kSpreadTablePitch>(reinterpret_cast<unsigned*>(shared));
  wait_for_kernel_ahead();
  a = after_wait(a);
  bias = after_wait(bias);
  load_activations(values, 0);
  synchronize_some(1, kMathThreads);
  RingPlace<kStages> place;
  for (int strip = first; strip < end; strip += kStripTiles) {
    const int width = min(kStripTiles, end - strip);
    for (int segment = 0; segment < segments; ++segment) {
      const int following = segment + 1 < segments ? segment + 1 : 0;
      Right next[kPerWarp];
      load_activations(next, following);
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
      memcpy(values, next, sizeof values);
    }
    finish_strip(strip, width);
  }
#endif
}

template <class T, int kType, bool kNested, int kChunk, int kTokenTiles>
void run(const Launch& launch, const Gemm4& p) {
  const auto kernel = gemm4_stream<T, kType, kNested, kChunk, kTokenTiles>;
  using Layout = SharedLayout<kChunk, kTokenTiles>;
  constexpr int kShared = Layout::kBytes;
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), kShared);
  const CUtensorMap weight = folded_map(p.packed, p.n, p.k / 2, kRows, Layout::kStageBoxes);
  launch_dependent(kernel, {dim3(launch.grid(ceil_div(p.n, kRows), 1)), kThreads, kShared}, launch, "gemm_4bit",
                   static_cast<const T*>(p.a), static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k),
                   weight, p.statistics, exact_log2(p.blocksize), exact_log2(p.statistics.nested_blocksize), p.bias,
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
#endif
