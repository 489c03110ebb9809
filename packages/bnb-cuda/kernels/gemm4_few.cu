// Products of a 4-bit weight with up to 16 rows of activations: bound by reading the weight.
//
// One thread block lives on each multiprocessor and takes tiles of 16 or 32 rows of the weight in turn.
// Its warps share the columns: a warp always has the same ones, two neighbouring chunks at a time. Codes
// and statistics are fetched several such units ahead, across the ends of tiles, so that memory never
// waits for the arithmetic; activations come out of the first-level cache, one chunk ahead. The partial
// sums of the warps meet in one of two buffers in shared memory, which costs one barrier per tile.
#include <type_traits>

#include "gemm4.h"

namespace bnb_gpu {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kLanes;
// Floats added to each token's row of partial sums: moves neighbouring tokens to other banks.
constexpr int kSumPadding = 4;

template <int kRowTiles, int kTokenTiles>
constexpr int kPartialFloats = kWarps * 8 * kTokenTiles * (16 * kRowTiles + kSumPadding);

template <int kRowTiles, int kTokenTiles>
constexpr int shared_bytes() {
  return kPairTableBytes + 2 * kPartialFloats<kRowTiles, kTokenTiles> * 4;
}

// Activations of one chunk: kChunk / 4 values per lane and token.
template <int kChunk, int kTokenTiles>
struct Activations {
  unsigned words[kTokenTiles][kChunk / 8];
};

template <class T, int kType, bool kNested, int kChunk, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_few(const T* __restrict__ a, int m, int n, int k, const uint8_t* __restrict__ packed,
              const Statistics statistics, int block_shift, int nested_shift, const void* __restrict__ bias,
              int bias_dtype, T* __restrict__ out) {
  constexpr int kDepth = kRowTiles == 1 ? 4 : 2;  // units that codes are fetched ahead
  constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles, kPitch = kRows + kSumPadding;
  constexpr int kLaneBytes = kChunk / 8;   // of a weight row
  constexpr int kLaneValues = kChunk / 4;  // of an activation row
  using Scale = BlockScale<kNested, true>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float nested_code[256];
  float* partial = reinterpret_cast<float*>(shared + kPairTableBytes);

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int g = lane / 4, t = lane % 4;
  const unsigned lane_offset = 4 * lane;
  const int chunks = k / kChunk, units = (chunks + 1) / 2;
  const int units_per_warp = (units + kWarps - 1) / kWarps;
  const int tiles = (n + kRows - 1) / kRows;

  Codes<kChunk> codes[kDepth][2][kRowTiles][2];
  typename Scale::Stored scales[kDepth][2][kRowTiles][2];
  const Scale scale_of(statistics, nested_code, nested_shift);

  // Fetches the next unit of this warp, if there is one, and moves on.
  int fetch_tile = blockIdx.x, fetch_index = 0;
  const auto fetch = [&](int slot) {
    const int unit = warp + kWarps * fetch_index;
    if (fetch_tile < tiles && unit < units) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t begin = static_cast<int64_t>(min(fetch_tile * kRows + 16 * r + 8 * h + g, n - 1)) * k;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int64_t element = begin + min(2 * unit + c, chunks - 1) * kChunk;
            codes[slot][c][r][h] = load_codes<kChunk>(packed + element / 2 + t * kLaneBytes);
            scales[slot][c][r][h] = scale_of.fetch(element >> block_shift);
          }
        }
      }
    }
    if (++fetch_index == units_per_warp) {
      fetch_index = 0;
      fetch_tile += gridDim.x;
    }
  };

  const auto load_activations = [&](int chunk) {
    Activations<kChunk, kTokenTiles> values;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int token = 8 * j + g;
      const uint4* from =
          reinterpret_cast<const uint4*>(a + static_cast<int64_t>(token) * k + chunk * kChunk + t * kLaneValues);
#pragma unroll
      for (int q = 0; q < kLaneValues / 8; ++q) {
        const uint4 four = token < m && chunk < chunks ? __ldg(from + q) : make_uint4(0, 0, 0, 0);
        values.words[j][4 * q] = four.x;
        values.words[j][4 * q + 1] = four.y;
        values.words[j][4 * q + 2] = four.z;
        values.words[j][4 * q + 3] = four.w;
      }
    }
    return values;
  };

#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    fetch(d);
  }
  Activations<kChunk, kTokenTiles> values = load_activations(2 * warp);
  build_pair_table<T, kType>(reinterpret_cast<unsigned*>(shared));
  __syncthreads();

  float sums[kRowTiles][kTokenTiles][4] = {};
  const auto multiply = [&](int slot, int c, const Activations<kChunk, kTokenTiles>& right) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float block[kTokenTiles][4] = {};
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) {
        unsigned left[4];
        decode_left<kChunk>(left, i, shared, lane_offset, codes[slot][c][r][0], codes[slot][c][r][1]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          multiply_tile<T>(block[j], left, right.words[j][2 * i], right.words[j][2 * i + 1]);
        }
      }
      const float upper = scale_of.value(scales[slot][c][r][0]), lower = scale_of.value(scales[slot][c][r][1]);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        sums[r][j][0] = __fmaf_rn(block[j][0], upper, sums[r][j][0]);
        sums[r][j][1] = __fmaf_rn(block[j][1], upper, sums[r][j][1]);
        sums[r][j][2] = __fmaf_rn(block[j][2], lower, sums[r][j][2]);
        sums[r][j][3] = __fmaf_rn(block[j][3], lower, sums[r][j][3]);
      }
    }
  };

  // Sums over the warps. Lane (g, t) holds rows g and g + 8, tokens 2 t and 2 t + 1 of each tile.
  const auto finish_tile = [&](int tile, int round) {
    float* buffer = partial + (round % 2) * kPartialFloats<kRowTiles, kTokenTiles>;
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
    __syncthreads();
    // Other warps each time, so that none falls behind.
    const int cell = (threadIdx.x + 128 * round) % kThreads;
    const int token = cell / kRows, row = cell % kRows;
    if (cell < kRows * kTokens && token < m && tile * kRows + row < n) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += buffer[(w * kTokens + token) * kPitch + row];
      }
      const int64_t place = static_cast<int64_t>(tile) * kRows + row;
      out[token * static_cast<int64_t>(n) + place] = from_float<T>(sum + load_bias(bias, bias_dtype, place));
    }
  };

  const int rounds = (tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / gridDim.x;
  const int items = rounds * units_per_warp;
  int index = 0, round = 0;
  for (int base = 0; base < items; base += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (base + d < items) {
        const int unit = warp + kWarps * index;
        const bool last = index + 1 == units_per_warp;
        const int next_unit = last ? warp : unit + kWarps;
        const Activations<kChunk, kTokenTiles> second = load_activations(2 * unit + 1);
        if (unit < units) {
          multiply(d, 0, values);
        }
        values = load_activations(2 * next_unit);
        if (unit < units) {
          multiply(d, 1, second);
        }
        fetch(d);
        index = last ? 0 : index + 1;
        if (last) {
          finish_tile(blockIdx.x + round * gridDim.x, round);
          ++round;
        }
      }
    }
  }
}

template <class T, int kType, bool kNested, int kChunk, int kRowTiles, int kTokenTiles>
void run(const Launch& launch, const Gemm4& p) {
  const auto kernel = gemm4_few<T, kType, kNested, kChunk, kRowTiles, kTokenTiles>;
  constexpr int kShared = shared_bytes<kRowTiles, kTokenTiles>();
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), kShared);
  kernel<<<launch.grid(ceil_div(p.n, 16 * kRowTiles), 1), kThreads, kShared, launch.stream()>>>(
      static_cast<const T*>(p.a), static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), p.packed,
      p.statistics, exact_log2(p.blocksize), exact_log2(p.statistics.nested_blocksize), p.bias, p.bias_dtype,
      static_cast<T*>(p.out));
}

}  // namespace

void gemm_4bit_few(const Launch& launch, const Gemm4& p) {
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
            // Wide tiles would take more shared memory than compute capabilities 8.6, 8.9 and 12.0 have.
            run<T, kType, kNested, kChunk, 1, 2>(launch, p);
          }
        });
      });
    });
  });
  check_launch("gemm_4bit");
}

}  // namespace bnb_gpu
