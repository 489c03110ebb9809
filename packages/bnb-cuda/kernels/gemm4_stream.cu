// Products of a 4-bit weight with up to 16 rows of activations on compute capabilities 9.0 to 10.x: bound by
// reading the weight.
//
// One thread block lives on each multiprocessor and takes tiles of 16 or 32 rows of the weight in turn. One
// warp has bulk copies bring the codes into a ring in shared memory, 2048 columns per stage, across the ends
// of tiles: memory is always busy. Sixteen warps share the columns of a stage; each also brings the
// statistics of one or two rows, so that every absmax is decoded once. Activations come out of the
// first-level cache, one chunk ahead. The partial sums of the warps meet in one of two buffers.
#include <type_traits>

#include "barriers.h"
#include "gemm4.h"

namespace bnb_gpu {
namespace {

constexpr int kWarps = 16;
constexpr int kMathThreads = kWarps * kLanes;
constexpr int kThreads = kMathThreads + kLanes;
constexpr int kStageColumns = 2048;
constexpr int kCodePitch = kStageColumns / 2 + 32;
// Floats added to each token's row of partial sums: moves neighbouring tokens to other banks.
constexpr int kSumPadding = 4;
constexpr int kSharedLimit = 226 * 1024;
// Statistics that are on their way to registers, in stages.
constexpr int kScalesInFlight = 2;

template <int kChunk, int kRowTiles, int kTokenTiles>
struct SharedLayout {
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kChunks = kStageColumns / kChunk;
  static constexpr int kScalePitch = kChunks + 4;
  static constexpr int kPartialFloats = kWarps * 8 * kTokenTiles * (kRows + kSumPadding);
  static constexpr int kStageBytes = kRows * (kCodePitch + kScalePitch * 4);
  static constexpr int kFixedBytes = kPairTableBytes + 2 * kPartialFloats * 4 + 256 * 4 + 256;
  static constexpr int kFit = (kSharedLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFit < 7 ? kFit : 7;
  static constexpr int kPartial = kPairTableBytes;
  static constexpr int kNestedCode = kPartial + 2 * kPartialFloats * 4;
  static constexpr int kBarriers = kNestedCode + 256 * 4;
  static constexpr int kRing = kBarriers + 256;
  static constexpr int kBytes = kRing + kStages * kStageBytes;
  static_assert(kStages >= 2, "a ring has two stages");
};

// Activations of one chunk: kChunk / 4 values per lane and token.
template <int kChunk, int kTokenTiles>
struct Activations {
  unsigned words[kTokenTiles][kChunk / 8];
};

__device__ __forceinline__ void synchronize_math_warps() {
#if BNB_BULK_COPIES
  asm volatile("bar.sync 1, %0;" ::"n"(kMathThreads) : "memory");
#endif
}

template <class T, int kType, bool kNested, int kChunk, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_stream(const T* __restrict__ a, int m, int n, int k, const uint8_t* __restrict__ packed,
                 const Statistics statistics, int block_shift, int nested_shift, const void* __restrict__ bias,
                 int bias_dtype, T* __restrict__ out) {
#if BNB_BULK_COPIES
  using Layout = SharedLayout<kChunk, kRowTiles, kTokenTiles>;
  using Scale = BlockScale<kNested, true>;
  constexpr int kStages = Layout::kStages, kAhead = kStages / 2;
  constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles, kPitch = kRows + kSumPadding;
  constexpr int kLaneBytes = kChunk / 8;              // of a weight row
  constexpr int kLaneValues = kChunk / 4;             // of an activation row
  constexpr int kPerWarp = Layout::kChunks / kWarps;  // chunks of a stage
  constexpr int kPerLane = Layout::kChunks / kLanes;  // statistics of a row of a stage
  extern __shared__ __align__(128) unsigned char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  uint64_t* drained = full + kStages;
  float* partial = reinterpret_cast<float*>(shared + Layout::kPartial);
  const auto stage_codes = [&](int slot) { return shared + Layout::kRing + slot * Layout::kStageBytes; };
  const auto stage_scales = [&](int slot) { return reinterpret_cast<float*>(stage_codes(slot) + kRows * kCodePitch); };

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int tiles = (n + kRows - 1) / kRows;
  const int rounds = (tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / gridDim.x;
  const int segments = (k + kStageColumns - 1) / kStageColumns;
  const int total = rounds * segments;

  if (threadIdx.x == kMathThreads) {
    for (int s = 0; s < kStages; ++s) {
      initialize(full + s, kWarps + 1);
      initialize(drained + s, kWarps);
    }
    publish_barriers();
  }
  const Scale scale_of(statistics, reinterpret_cast<float*>(shared + Layout::kNestedCode), nested_shift);
  __syncthreads();

  if (warp == kWarps) {
    RingPlace<kStages> place;
    for (int round = 0; round < rounds; ++round) {
      const int row = min((static_cast<int>(blockIdx.x) + round * static_cast<int>(gridDim.x)) * kRows + lane, n - 1);
      const uint8_t* from = packed + static_cast<int64_t>(row) * k / 2;
      for (int segment = 0; segment < segments; ++segment) {
        const int bytes = min(kStageColumns, k - segment * kStageColumns) / 2;
        wait(drained + place.slot, place.parity ^ 1);
        if (lane == 0) {
          arrive_expecting(full + place.slot, bytes * kRows);
        }
        __syncwarp();
        if (lane < kRows) {
          copy_bulk(stage_codes(place.slot) + lane * kCodePitch, from + segment * (kStageColumns / 2), bytes,
                    full + place.slot);
        }
        place.advance();
      }
    }
    return;
  }

  const int g = lane / 4, t = lane % 4;
  const unsigned lane_offset = 4 * lane;

  // Statistics: this warp brings those of rows `warp` (and `warp` + 16), a lane those of chunks lane + 32 e.
  // More of them are in flight at the beginning, when nothing else is to be done.
  constexpr int kRaw = kAhead > kScalesInFlight ? kAhead : kScalesInFlight;
  typename Scale::Stored raw[kRaw][kRowTiles][kPerLane];
  int raw_tile = blockIdx.x, raw_segment = 0;
  const auto fetch_scales = [&](int slot) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int64_t begin = static_cast<int64_t>(min(raw_tile * kRows + 16 * r + warp, n - 1)) * k;
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        const int column = raw_segment * kStageColumns + (kLanes * e + lane) * kChunk;
        raw[slot][r][e] = scale_of.fetch((begin + min(column, k - 1)) >> block_shift);
        raw[slot][r][e].absmax = column < k ? raw[slot][r][e].absmax : 0.0f;
      }
    }
    if (++raw_segment == segments) {
      raw_segment = 0;
      raw_tile += gridDim.x;
    }
  };
  RingPlace<kStages> scale_place;
  int scales_left = total;
  const auto store_scales = [&](int slot) {
    if (scales_left > 0) {
      --scales_left;
      wait(drained + scale_place.slot, scale_place.parity ^ 1);
      float* to = stage_scales(scale_place.slot);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int e = 0; e < kPerLane; ++e) {
          to[(16 * r + warp) * Layout::kScalePitch + kLanes * e + lane] = scale_of.value(raw[slot][r][e]);
        }
      }
      __syncwarp();
      if (lane == 0) {
        arrive(full + scale_place.slot);
      }
      scale_place.advance();
    }
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    fetch_scales(s);
  }
  build_pair_table<T, kType>(reinterpret_cast<unsigned*>(shared));
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    store_scales(s);
  }
#pragma unroll
  for (int s = 0; s < kScalesInFlight; ++s) {
    fetch_scales(s);
  }

  const auto load_activations = [&](int column) {
    Activations<kChunk, kTokenTiles> values;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int token = 8 * j + g;
      const uint4* from =
          reinterpret_cast<const uint4*>(a + static_cast<int64_t>(token) * k + column + t * kLaneValues);
#pragma unroll
      for (int q = 0; q < kLaneValues / 8; ++q) {
        const uint4 four = token < m && column < k ? __ldg(from + q) : make_uint4(0, 0, 0, 0);
        values.words[j][4 * q] = four.x;
        values.words[j][4 * q + 1] = four.y;
        values.words[j][4 * q + 2] = four.z;
        values.words[j][4 * q + 3] = four.w;
      }
    }
    return values;
  };

  float sums[kRowTiles][kTokenTiles][4] = {};
  // Chunks that are multiplied together, each with two sums: short chains of products, much to overlap.
  constexpr int kTogether = kTokenTiles == 1 ? 2 : 1, kChains = kTokenTiles == 1 ? 2 : 1;
  using Right = Activations<kChunk, kTokenTiles>;
  const auto multiply = [&](int slot, int chunk, const Right(&right)[kTogether]) {
    const unsigned char* from = stage_codes(slot) + g * kCodePitch + chunk * (kChunk / 2) + t * kLaneBytes;
    const float* scales = stage_scales(slot) + g * Layout::kScalePitch + chunk;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      Codes<kChunk> codes[kTogether][2];
      float scale[kTogether][2];
#pragma unroll
      for (int c = 0; c < kTogether; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * r + 8 * h, other = kWarps * c;
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
          unsigned left[4];
          decode_left<kChunk>(left, i, shared, lane_offset, codes[c][0], codes[c][1]);
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
            const float sum = kChains == 2 ? block[c][0][j][i] + block[c][kChains - 1][j][i] : block[c][0][j][i];
            sums[r][j][i] = __fmaf_rn(sum, scale[c][i / 2], sums[r][j][i]);
          }
        }
      }
    }
  };

  // Sums over the warps. Lane (g, t) holds rows g and g + 8, tokens 2 t and 2 t + 1 of each tile.
  const auto finish_tile = [&](int round) {
    float* buffer = partial + (round % 2) * Layout::kPartialFloats;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * r + 8 * (i / 2) + g, token = 8 * j + 2 * t + i % 2;
          buffer[(warp * kTokens + token) * kPitch + row] = sums[r][j][i];
          sums[r][j][i] = 0.0f;
        }
      }
    }
    // Who is past this barrier may fill the other buffer: nobody reads it any more.
    synchronize_math_warps();
    // Other warps each time, so that none falls behind.
    const int cell = (threadIdx.x + 128 * round) % kMathThreads;
    const int token = cell / kRows, row = cell % kRows;
    const int place = (static_cast<int>(blockIdx.x) + round * static_cast<int>(gridDim.x)) * kRows + row;
    if (cell < kRows * kTokens && token < m && place < n) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += buffer[(w * kTokens + token) * kPitch + row];
      }
      out[token * static_cast<int64_t>(n) + place] = from_float<T>(sum + load_bias(bias, bias_dtype, place));
    }
  };

  // Activations of the chunks from `column` on that are multiplied together.
  const auto load_right = [&](Right(&to)[kTogether], int column) {
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
      to[c] = load_activations(column + c * kWarps * kChunk);
    }
  };
  Right values[kTogether];
  load_right(values, warp * kChunk);
  synchronize_math_warps();
  RingPlace<kStages> place;
  int segment = 0, round = 0;
  for (int base = 0; base < total; base += kScalesInFlight) {
#pragma unroll
    for (int d = 0; d < kScalesInFlight; ++d) {
      if (base + d < total) {
        store_scales(d);
        fetch_scales(d);
        const bool last = segment + 1 == segments;
        const int begin = segment * kStageColumns, next_begin = last ? 0 : begin + kStageColumns;
        wait(full + place.slot, place.parity);
#pragma unroll
        for (int c = 0; c < kPerWarp; c += kTogether) {
          const int chunk = kWarps * c + warp;
          Right next[kTogether];
          load_right(next, c + kTogether < kPerWarp ? begin + (chunk + kTogether * kWarps) * kChunk
                                                    : next_begin + warp * kChunk);
          // Chunks beyond the last column have activations of zero; codes there are finite in any case.
          if (begin + chunk * kChunk < k) {
            multiply(place.slot, chunk, values);
          }
#pragma unroll
          for (int e = 0; e < kTogether; ++e) {
            values[e] = next[e];
          }
        }
        __syncwarp();
        if (lane == 0) {
          arrive(drained + place.slot);
        }
        place.advance();
        segment = last ? 0 : segment + 1;
        if (last) {
          finish_tile(round);
          ++round;
        }
      }
    }
  }
#endif
}

template <class T, int kType, bool kNested, int kChunk, int kRowTiles, int kTokenTiles>
void run(const Launch& launch, const Gemm4& p) {
  const auto kernel = gemm4_stream<T, kType, kNested, kChunk, kRowTiles, kTokenTiles>;
  constexpr int kShared = SharedLayout<kChunk, kRowTiles, kTokenTiles>::kBytes;
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), kShared);
  kernel<<<launch.grid(ceil_div(p.n, 16 * kRowTiles), 1), kThreads, kShared, launch.stream()>>>(
      static_cast<const T*>(p.a), static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), p.packed,
      p.statistics, exact_log2(p.blocksize), exact_log2(p.statistics.nested_blocksize), p.bias, p.bias_dtype,
      static_cast<T*>(p.out));
}

}  // namespace

void gemm_4bit_stream(const Launch& launch, const Gemm4& p) {
  const bool wide = prefers_wide_tiles(p.n, launch.processors());
  with_half_dtype(p.dtype, [&](auto type) {
    with_quant_type(p.quant_type, [&](auto quant) {
      with_nested(p.statistics, [&](auto nested) {
        with_chunk(p.blocksize, [&](auto chunk) {
          using T = typename decltype(type)::type;
          constexpr int kType = decltype(quant)::value, kChunk = decltype(chunk)::value;
          constexpr bool kNested = decltype(nested)::value;
          if (p.m <= 8) {
            wide ? run<T, kType, kNested, kChunk, 2, 1>(launch, p) : run<T, kType, kNested, kChunk, 1, 1>(launch, p);
          } else {
            wide ? run<T, kType, kNested, kChunk, 2, 2>(launch, p) : run<T, kType, kNested, kChunk, 1, 2>(launch, p);
          }
        });
      });
    });
  });
  check_launch("gemm_4bit");
}

}  // namespace bnb_gpu
