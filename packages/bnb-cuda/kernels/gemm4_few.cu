// Products of a 4-bit weight with up to 16 rows of activations: bound by reading the weight.
//
// A thread block takes 16 or 32 rows of the weight. Its warps take chunks of k in turn, so that together
// they read each row in order; every warp has several chunks in flight. The partial sums of the warps
// meet in shared memory.
#include <type_traits>

#include "gemm4.h"

namespace bnb_gpu {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;

template <class T, int kType, bool kNested, int kChunk, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kThreads)
    gemm4_few(const T* __restrict__ a, int m, int n, int k, const uint8_t* __restrict__ packed,
              const Statistics statistics, int block_shift, int nested_shift, const void* __restrict__ bias,
              int bias_dtype, T* __restrict__ out) {
  constexpr int kDepth = kRowTiles == 1 ? 4 : 3;
  constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles;
  constexpr int kLaneBytes = kChunk / 8;   // of a weight row
  constexpr int kLaneValues = kChunk / 4;  // of an activation row
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float nested_code[256];
  unsigned* table = reinterpret_cast<unsigned*>(shared);

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows;
  const int chunks = k / kChunk;

  const BlockScale<kNested> scale_of(statistics, nested_code, nested_shift);
  build_pair_table<T, kType>(table);
  const unsigned* lane_table = table + lane;

  int64_t row_begin[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_begin[r][h] = static_cast<int64_t>(min(first_row + 16 * r + 8 * h + g, n - 1)) * k;
    }
  }

  Codes<kChunk> codes[kDepth][kRowTiles][2];
  float scales[kDepth][kRowTiles][2];
  const auto fetch_codes = [&](int slot, int chunk) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t element = row_begin[r][h] + static_cast<int64_t>(chunk) * kChunk;
        codes[slot][r][h] = load_codes<kChunk>(packed + element / 2 + t * kLaneBytes);
      }
    }
  };
  const auto fetch_scales = [&](int slot, int chunk) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scales[slot][r][h] = scale_of((row_begin[r][h] + static_cast<int64_t>(chunk) * kChunk) >> block_shift);
      }
    }
  };

  // The first loads leave before the tables are ready.
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    const int chunk = warp + d * kWarps;
    if (chunk < chunks) {
      fetch_codes(d, chunk);
    }
  }
  __syncthreads();
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    const int chunk = warp + d * kWarps;
    if (chunk < chunks) {
      fetch_scales(d, chunk);
    }
  }

  float sums[kRowTiles][kTokenTiles][4] = {};
  for (int start = warp; start < chunks; start += kDepth * kWarps) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int chunk = start + d * kWarps;
      if (chunk >= chunks) {
        break;
      }
      // Activations: kChunk / 4 values per lane and token.
      unsigned values[kTokenTiles][kLaneValues / 2];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = 8 * j + g;
        const uint4* from =
            reinterpret_cast<const uint4*>(a + static_cast<int64_t>(token) * k + chunk * kChunk + t * kLaneValues);
#pragma unroll
        for (int q = 0; q < kLaneValues / 8; ++q) {
          const uint4 four = token < m ? __ldg(from + q) : make_uint4(0, 0, 0, 0);
          values[j][4 * q] = four.x;
          values[j][4 * q + 1] = four.y;
          values[j][4 * q + 2] = four.z;
          values[j][4 * q + 3] = four.w;
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const LeftOperands<kChunk> left(lane_table, codes[d][r][0], codes[d][r][1]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          float block[4] = {};
#pragma unroll
          for (int i = 0; i < kChunk / 16; ++i) {
            multiply_tile<T>(block, left.registers[i], values[j][2 * i], values[j][2 * i + 1]);
          }
          sums[r][j][0] = __fmaf_rn(block[0], scales[d][r][0], sums[r][j][0]);
          sums[r][j][1] = __fmaf_rn(block[1], scales[d][r][0], sums[r][j][1]);
          sums[r][j][2] = __fmaf_rn(block[2], scales[d][r][1], sums[r][j][2]);
          sums[r][j][3] = __fmaf_rn(block[3], scales[d][r][1], sums[r][j][3]);
        }
      }
      const int next = chunk + kDepth * kWarps;
      if (next < chunks) {
        fetch_codes(d, next);
        fetch_scales(d, next);
      }
    }
  }

  // Sum over the warps. Lane (g, t) holds rows g and g + 8, tokens 2 t and 2 t + 1 of each tile.
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * r + 8 * (i / 2) + g, token = 8 * j + 2 * t + i % 2;
        partial[(warp * kTokens + token) * kRows + row] = sums[r][j][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kTokens; i += kThreads) {
    const int row = first_row + i % kRows, token = i / kRows;
    if (row < n && token < m) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += partial[w * kRows * kTokens + i];
      }
      out[static_cast<int64_t>(token) * n + row] = from_float<T>(sum + load_bias(bias, bias_dtype, row));
    }
  }
}

template <class T, int kType, bool kNested, int kChunk, int kRowTiles, int kTokenTiles>
void run(const Launch& launch, const Gemm4& p) {
  const auto kernel = gemm4_few<T, kType, kNested, kChunk, kRowTiles, kTokenTiles>;
  kernel<<<static_cast<unsigned>(ceil_div(p.n, 16 * kRowTiles)), kThreads, kPairTableBytes, launch.stream()>>>(
      static_cast<const T*>(p.a), static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), p.packed,
      p.statistics, exact_log2(p.blocksize), exact_log2(p.statistics.nested_blocksize), p.bias, p.bias_dtype,
      static_cast<T*>(p.out));
}

}  // namespace

void gemm_4bit_few(const Launch& launch, const Gemm4& p) {
  // Two row tiles share the activations, once there are enough rows to fill the device.
  const bool wide = p.n >= int64_t{32} * launch.processors();
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
