// int8 products with up to 16 rows of activations, bound by reading the weight. See gemm4_few.cu: the
// same division of work, with codes that need no decoding.
#include <type_traits>

#include "dependent.h"
#include "int8_gemm.h"

namespace bnb_gpu {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kChunk = 64;  // columns per step of a warp: 16 bytes per lane and row

__device__ __forceinline__ int bits_of(int value) { return value; }
__device__ __forceinline__ int bits_of(float value) { return __float_as_int(value); }

// products += values @ codes.T over the outlier columns among 64 whose codes the lanes of a warp hold, 16 from `column`
// on each, as `chunk`.
template <class T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiply_masked(float (&products)[kRowTiles][kTokenTiles][4],
                                                const uint4 (&chunk)[kRowTiles][2], const T* __restrict__ values,
                                                const unsigned* flags, int m, int k, int g, int column) {
  const unsigned flagged = flags_of<16>(flags, column, k);
  if (!group_any(flagged != 0)) {
    return;
  }
  unsigned right[kTokenTiles][8];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int token = 8 * j + g;
    uint4 halves[2] = {};
    if (token < m && flagged != 0) {
      const uint4* from = reinterpret_cast<const uint4*>(values + static_cast<int64_t>(token) * k + column);
      halves[0] = from[0];
      halves[1] = from[1];
    }
    memcpy(right[j], halves, sizeof halves);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      right[j][i] &= pair_mask(flagged >> (2 * i));
    }
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const unsigned upper[4] = {chunk[r][0].x, chunk[r][0].y, chunk[r][0].z, chunk[r][0].w};
    const unsigned lower[4] = {chunk[r][1].x, chunk[r][1].y, chunk[r][1].z, chunk[r][1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned left[4] = {widen_codes<T, 0>(upper[i]), widen_codes<T, 0>(lower[i]), widen_codes<T, 1>(upper[i]),
                                widen_codes<T, 1>(lower[i])};
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        multiply_tile<T>(products[r][j], left, right[j][2 * i], right[j][2 * i + 1]);
      }
    }
  }
}

// Operands of the products of up to so many outlier columns, side by side: what a thread block's rows of the weight and
// all rows of the activations have there. Asked for before the integers are multiplied, and multiplied afterwards.
constexpr int kGathered = Outliers::kFilled;
static_assert(kGathered == kLanes, "a lane has a column");

template <class T, int kRows, int kTokens>
struct GatheredOutliers {
  static constexpr int kOwnRows = kRows / kWarps, kOwnTokens = kTokens / kWarps;

  // A pitch at which lanes that read rows use different banks.
  struct Storage {
    float codes[kRows][kGathered + 1];
    float values[kTokens][kGathered];
  };

  int8_t codes[kOwnRows];
  T values[kOwnTokens];

  // `column`: the lane's, if it `exists`.
  __device__ __forceinline__ GatheredOutliers(const int8_t* __restrict__ b, const T* __restrict__ a, int m, int n,
                                              int k, int first_row, int warp, bool exists, int column) {
#pragma unroll
    for (int j = 0; j < kOwnRows; ++j) {
      const int row = first_row + warp + j * kWarps;
      codes[j] = exists && row < n ? b[static_cast<int64_t>(row) * k + column] : 0;
    }
#pragma unroll
    for (int j = 0; j < kOwnTokens; ++j) {
      const int token = warp + j * kWarps;
      values[j] = exists && token < m ? a[static_cast<int64_t>(token) * k + column] : from_float<T>(0.0f);
    }
  }

  __device__ __forceinline__ void share(Storage& storage, int warp, int lane) const {
#pragma unroll
    for (int j = 0; j < kOwnRows; ++j) {
      storage.codes[warp + j * kWarps][lane] = static_cast<float>(codes[j]);
    }
#pragma unroll
    for (int j = 0; j < kOwnTokens; ++j) {
      storage.values[warp + j * kWarps][lane] = to_float(values[j]);
    }
  }
};

// Thread blocks that a multiprocessor has registers for; many outlier columns would take more, and leave fewer.
template <int kRowTiles, int kTokenTiles>
constexpr int kBlocks = (kRowTiles > 1)     ? 2
                        : (kTokenTiles > 1) ? 3
                                            : 4;

template <class T, bool kOutliers, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kBlocks<kRowTiles, kTokenTiles>)
    int8_few(const int8_t* __restrict__ a, const int8_t* __restrict__ b, int m, int n, int k,
             const float* __restrict__ a_absmax, const float* __restrict__ b_absmax, const T* __restrict__ values,
             const Outliers outliers, const void* __restrict__ bias, int bias_dtype, T* __restrict__ out) {
  constexpr int kDepth = kRowTiles == 1 ? 4 : 3;
  constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles;
  using Gathered = GatheredOutliers<T, kRows, kTokens>;
  __shared__ int partial[kWarps * kTokens * kRows];
  [[maybe_unused]] __shared__ std::conditional_t<kOutliers, typename Gathered::Storage, int> gathered;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows;
  const int chunks = (k + kChunk - 1) / kChunk;
  const uint4 zero = make_uint4(0, 0, 0, 0);

  const int8_t* rows[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows[r][h] = b + static_cast<int64_t>(min(first_row + 16 * r + 8 * h + g, n - 1)) * k + t * 16;
    }
  }
  if (warp * kChunk + t * 16 < k) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      prefetch(rows[r][0] + warp * kChunk);
      prefetch(rows[r][1] + warp * kChunk);
    }
  }
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  a = after_wait(a);
  b = after_wait(b);
  a_absmax = after_wait(a_absmax);
  b_absmax = after_wait(b_absmax);
  values = after_wait(values);
  bias = after_wait(bias);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    rows[r][0] = after_wait(rows[r][0]);
    rows[r][1] = after_wait(rows[r][1]);
  }
  int count = 0, own_column = 0;
  if constexpr (kOutliers) {
    count = *outliers.count;
    // A list with flags can be read before its length is known. One without may be longer than there are columns.
    if (outliers.flags != nullptr) {
      own_column = outliers.columns[min(lane, k - 1)];
    } else if (lane < count) {
      own_column = outliers.columns[lane];
    }
  }
  uint4 codes[kDepth][kRowTiles][2];
  const auto fetch = [&](int slot, int chunk) {
    const int column = chunk * kChunk;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        codes[slot][r][h] = column + t * 16 < k ? __ldcs(reinterpret_cast<const uint4*>(rows[r][h] + column)) : zero;
      }
    }
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (warp + d * kWarps < chunks) {
      fetch(d, warp + d * kWarps);
    }
  }

  int sums[kRowTiles][kTokenTiles][4] = {};
  // `also` is called with the codes of each chunk and its column besides.
  const auto multiply = [&](auto&& also) {
    for (int start = warp; start < chunks; start += kDepth * kWarps) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int chunk = start + d * kWarps;
        if (chunk >= chunks) {
          break;
        }
        const int column = chunk * kChunk + t * 16;
        uint4 right[kTokenTiles];
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int token = 8 * j + g;
          right[j] = token < m && column < k
                         ? *reinterpret_cast<const uint4*>(a + static_cast<int64_t>(token) * k + column)
                         : zero;
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const uint4 upper = codes[d][r][0], lower = codes[d][r][1];
          const unsigned first[4] = {upper.x, lower.x, upper.y, lower.y};
          const unsigned second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            multiply_tile8(sums[r][j], first, right[j].x, right[j].y);
            multiply_tile8(sums[r][j], second, right[j].z, right[j].w);
          }
        }
        also(codes[d], column);
        if (chunk + kDepth * kWarps < chunks) {
          fetch(d, chunk + kDepth * kWarps);
        }
      }
    }
  };
  const auto share_sums = [&](const auto& own) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * r + 8 * (i / 2) + g, token = 8 * j + 2 * t + i % 2;
          partial[(warp * kTokens + token) * kRows + row] = bits_of(own[r][j][i]);
        }
      }
    }
    __syncthreads();
  };

  constexpr int kOwn = (kRows * kTokens + kThreads - 1) / kThreads;  // elements that this thread finishes
  float corrected[kOwn] = {};
  // Values of float32 find no place in the matrix units.
  if (kOutliers && sizeof(T) == 2 && outliers.flags != nullptr && count > kGathered) {
    float products[kRowTiles][kTokenTiles][4] = {};
    multiply([&](const uint4(&chunk)[kRowTiles][2], int column) {
      multiply_masked<T>(products, chunk, values, outliers.flags, m, k, g, column);
    });
    share_sums(products);
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int i = threadIdx.x + e * kThreads, row = first_row + i % kRows;
      if (row < n && i / kRows < m) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          sum += __int_as_float(partial[w * kRows * kTokens + i]);
        }
        corrected[e] = correction_of(sum, b_absmax[row]);
      }
    }
    __syncthreads();
  } else {
    const auto only_integers = [](const uint4(&)[kRowTiles][2], int) {};
    if constexpr (kOutliers) {
      const Gathered own(b, values, m, n, k, first_row, warp, lane < count, own_column);
      multiply(only_integers);
      if (count > 0) {
        own.share(gathered, warp, lane);
        __syncthreads();
      }
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        const int i = threadIdx.x + e * kThreads, row = first_row + i % kRows, token = i / kRows;
        if (row < n && token < m) {
          float sum = 0.0f;
          for (int c = 0; c < min(count, kGathered); ++c) {
            sum = __fmaf_rn(gathered.values[token][c], gathered.codes[i % kRows][c], sum);
          }
          corrected[e] = correction_of(sum, b_absmax[row]);
          if (count > kGathered) {
            corrected[e] += outlier_product(values + static_cast<int64_t>(token) * k, b + static_cast<int64_t>(row) * k,
                                            outliers.columns + kGathered, count - kGathered, b_absmax[row]);
          }
        }
      }
    } else {
      multiply(only_integers);
    }
  }
  share_sums(sums);
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    const int i = threadIdx.x + e * kThreads, row = first_row + i % kRows, token = i / kRows;
    if (row < n && token < m) {
      int sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += partial[w * kRows * kTokens + i];
      }
      out[static_cast<int64_t>(token) * n + row] = from_float<T>(
          scaled_product(sum, a_absmax[token], b_absmax[row], corrected[e], load_bias(bias, bias_dtype, row)));
    }
  }
}

template <class T, bool kOutliers, int kRowTiles, int kTokenTiles>
void run(const Launch& launch, const Gemm8& p) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.n, 16 * kRowTiles)));
  launch_dependent(int8_few<T, kOutliers, kRowTiles, kTokenTiles>, {blocks, kThreads}, launch, "int8_linear", p.a, p.b,
                   static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), p.a_absmax, p.b_absmax,
                   static_cast<const T*>(p.values), p.outliers, p.bias, p.bias_dtype, static_cast<T*>(p.out));
}

}  // namespace

bool int8_gemm_fits(int64_t n, int64_t k, int capability) {
  return capability >= 80 && k > 0 && n > 0 && k % 16 == 0 && n < (int64_t{1} << 31) && k < (int64_t{1} << 31);
}

void int8_gemm_few(const Launch& launch, const Gemm8& p) {
  const bool wide = p.n >= int64_t{64} * launch.processors();
  with_dtype(p.dtype, [&](auto type) {
    with_outliers(p, [&](auto outliers) {
      using T = typename decltype(type)::type;
      constexpr bool kOutliers = decltype(outliers)::value;
      if (p.m <= 8) {
        wide ? run<T, kOutliers, 2, 1>(launch, p) : run<T, kOutliers, 1, 1>(launch, p);
      } else {
        wide ? run<T, kOutliers, 2, 2>(launch, p) : run<T, kOutliers, 1, 2>(launch, p);
      }
    });
  });
  check_launch("int8_linear");
}

}  // namespace bnb_gpu
