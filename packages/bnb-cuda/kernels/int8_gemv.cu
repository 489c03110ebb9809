// LLM.int8() for very few rows of activations in one kernel, bound by reading the weight (compute capability 8.0 and
// later).
//
// Every thread block quantizes all rows of the activations for itself, into shared memory, while its first codes of the
// weight are on their way. A warp multiplies rows of the weight, 512 columns at a time, and each lane has a ring of its
// own in shared memory; of few rows, several warps share each. In outlier columns the activations have code 0, and
// lanes that have such columns multiply the values in float32.
#include "copies.h"
#include "dependent.h"
#include "int8_gemm.h"
#include "int8_quant.h"

namespace bnb_gpu {
namespace {

constexpr int kThreads = 1024;  // one thread block on a multiprocessor
constexpr int kWarps = kThreads / kLanes;
constexpr int kOwn = 16;               // columns of a lane
constexpr int kChunk = kLanes * kOwn;  // columns of a warp
constexpr int kDepth = 4;              // pieces of a row that a warp has under way
constexpr int kRingBytes = kThreads * kDepth * kOwn;
constexpr int kMostTokens = 2;

// Shared memory that a thread block may have, but for a kilobyte of variables.
constexpr int64_t most_shared(int capability) {
  const bool is_large = capability >= 90 && capability < 120;
  return (is_large ? 226 : capability < 86 ? 162 : 98) << 10;
}

// sum + the products of four codes.
__device__ __forceinline__ int dot4(unsigned a, unsigned b, int sum) {
#ifdef BNB_HIP
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  }
  return sum;
#else
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#endif
}

// The activations in shared memory, in rows of whole chunks: codes, a bit for each outlier column, and values, which
// are 0 in other columns where there are outliers.
template <class T, int kTokens>
struct Quantized {
  int8_t* codes;
  unsigned* flags;
  T* values;
  int pitch;

  // `shared`: after the rings.
  __device__ __forceinline__ Quantized(unsigned char* shared, int k)
      : codes(reinterpret_cast<int8_t*>(shared)), pitch((k + kChunk - 1) / kChunk * kChunk) {
    flags = reinterpret_cast<unsigned*>(codes + kTokens * pitch);
    values = reinterpret_cast<T*>(flags + pitch / 32);
  }

  static int64_t bytes(int64_t k) {
    const int64_t pitch = ceil_div(k, kChunk) * kChunk;
    return kRingBytes + pitch * kTokens * static_cast<int64_t>(1 + sizeof(T)) + pitch / 8;
  }
};

// Quantizes `m` rows; returns whether there are outlier columns. `flags` begin at 0, and all threads call this.
template <class T, bool kOutliers, int kTokens>
__device__ __forceinline__ bool quantize(const Quantized<T, kTokens>& q, const T* __restrict__ x, int m, int k,
                                         float threshold, float (&absmax)[kTokens]) {
  __shared__ unsigned largest[kTokens][kWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  unsigned bits[kTokens] = {};
  bool found = false;
  for (int column = threadIdx.x * kPerVector; column < k; column += kThreads * kPerVector) {
    unsigned flagged = 0;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      Vector<T, kPerVector> values = {};
      if (t < m) {
        values = *reinterpret_cast<const Vector<T, kPerVector>*>(x + static_cast<int64_t>(t) * k + column);
      }
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        const float value = to_float(values.values[i]);
        bits[t] = max(bits[t], inlier_bits(value, threshold));
        flagged |= kOutliers && fabsf(value) >= threshold ? 1u << i : 0u;
      }
      *reinterpret_cast<Vector<T, kPerVector>*>(q.values + t * q.pitch + column) = values;
    }
    if (flagged != 0) {
      atomicOr(q.flags + column / 32, flagged << (column % 32));
      found = true;
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    bits[t] = group_max<kLanes>(bits[t]);
    if (lane == 0) {
      largest[t][warp] = bits[t];
    }
  }
  found = __syncthreads_or(found) != 0;
  float scales[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    absmax[t] = bnb::float_of(group_max<kLanes>(largest[t][lane % kWarps]));
    scales[t] = scale_of(absmax[t]);
  }
  // Columns beyond the last one get code 0 too.
  for (int column = threadIdx.x * kPerVector; column < q.pitch; column += kThreads * kPerVector) {
    const unsigned flagged = kOutliers ? q.flags[column / 32] >> (column % 32) : 0u;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      Vector<int8_t, kPerVector> codes = {};
      if (column < k) {
        auto& place = *reinterpret_cast<Vector<T, kPerVector>*>(q.values + t * q.pitch + column);
        Vector<T, kPerVector> values = place;
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) {
          const float value = to_float(values.values[i]);
          const bool is_outlier = kOutliers && (flagged >> i & 1u) != 0;
          codes.values[i] = is_outlier ? 0 : encode(value, absmax[t], scales[t]);
          values.values[i] = is_outlier ? values.values[i] : from_float<T>(0.0f);
        }
        if (kOutliers && found) {
          place = values;
        }
      } else if (kOutliers && found) {
        *reinterpret_cast<Vector<T, kPerVector>*>(q.values + t * q.pitch + column) = {};
      }
      *reinterpret_cast<Vector<int8_t, kPerVector>*>(q.codes + t * q.pitch + column) = codes;
    }
  }
  __syncthreads();
  return found;
}

// Lanes add up the products in their outlier columns one by one, or, if one has as many as this, those in all columns.
constexpr int kManyColumns = 4;

// sums += values * codes over a lane's columns, from `column` on: those that have a bit in `flagged`, or all.
template <class T, int kTokens>
__device__ __forceinline__ void multiply_flagged(float (&sums)[kTokens], const Quantized<T, kTokens>& q, int column,
                                                 uint4 codes, unsigned flagged) {
  for (; flagged != 0; flagged &= flagged - 1) {
    const int i = __ffs(static_cast<int>(flagged)) - 1;
    const unsigned word = i < 8 ? (i < 4 ? codes.x : codes.y) : (i < 12 ? codes.z : codes.w);
    const float code = static_cast<float>(static_cast<int8_t>(word >> (i % 4 * 8)));
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      sums[t] = __fmaf_rn(to_float(q.values[t * q.pitch + column + i]), code, sums[t]);
    }
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void multiply_all(float (&sums)[kTokens], const Quantized<T, kTokens>& q, int column,
                                             uint4 codes) {
  const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float four[4] = {code_value<0>(words[w]), code_value<1>(words[w]), code_value<2>(words[w]),
                           code_value<3>(words[w])};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const auto values = *reinterpret_cast<const Vector<T, 4>*>(q.values + t * q.pitch + column + 4 * w);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[t] = __fmaf_rn(to_float(values.values[i]), four[i], sums[t]);
      }
    }
  }
}

// `parts`: warps that share a row of the weight; more than one only if all rows are multiplied at once.
template <class T, bool kOutliers, int kTokens>
__global__ void __launch_bounds__(kThreads)
    int8_rows(const T* __restrict__ x, const int8_t* __restrict__ b, int m, int n, int k, int parts, float threshold,
              const float* __restrict__ b_absmax, const void* __restrict__ bias, int bias_dtype, T* __restrict__ out) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int part_sums[kTokens][kWarps];
  [[maybe_unused]] __shared__ float part_corrections[kTokens][kWarps];
  const Quantized<T, kTokens> q(shared + kRingBytes, k);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int index = static_cast<int>(blockIdx.x) * kWarps + warp, stride = static_cast<int>(gridDim.x) * kWarps / parts;
  const int part = index % parts, all_chunks = q.pitch / kChunk;
  const int begin = all_chunks * part / parts, chunks = all_chunks * (part + 1) / parts - begin;
  int row = index / parts;
  const int steps = row < n ? (n - row + stride - 1) / stride * chunks : 0;
  // What comes next of the weight.
  const int8_t* next = b + static_cast<int64_t>(row) * k;
  int next_chunk = 0;
  if (kOutliers) {
    for (int i = threadIdx.x; i < q.pitch / 32; i += kThreads) {
      q.flags[i] = 0;
    }
    __syncthreads();
  }
  if (steps > 0 && begin * kChunk + lane * kOwn < k) {
    prefetch(next + begin * kChunk + lane * kOwn);
  }
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  x = after_wait(x);
  b_absmax = after_wait(b_absmax);
  bias = after_wait(bias);
  next = after_wait(next);

  uint4* const ring = reinterpret_cast<uint4*>(shared) + threadIdx.x;
  // Each step's is a group of its own, whatever it has to bring.
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int column = (begin + next_chunk) * kChunk + lane * kOwn;
      copy_async(ring + step % kDepth * kThreads, next + min(column, k - kOwn), column < k);
      if (++next_chunk == chunks) {
        next_chunk = 0;
        next += static_cast<int64_t>(stride) * k;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kDepth; ++step) {
    fetch(step);
  }
  float row_absmax = 0.0f, row_bias = 0.0f;
  const auto fetch_constants = [&] {
    if (row < n) {
      row_absmax = b_absmax[row];
      row_bias = load_bias(bias, bias_dtype, row);
    }
  };
  fetch_constants();
  float absmax[kTokens];
  const bool has_outliers = quantize<T, kOutliers>(q, x, m, k, threshold, absmax);

  int sums[kTokens] = {};
  [[maybe_unused]] float corrections[kTokens] = {};
  const auto store = [&](int token, int sum, float correction) {
    if (lane == token && token < m) {
      out[static_cast<int64_t>(token) * n + row] = from_float<T>(
          scaled_product(sum, absmax[token], row_absmax, correction_of(correction, row_absmax), row_bias));
    }
  };
  int chunk = 0;
#pragma unroll 4
  for (int step = 0; step < steps; ++step) {
    const int column = (begin + chunk) * kChunk + lane * kOwn;
    wait_for_copies<kDepth - 1>();
    const uint4 right = ring[step % kDepth * kThreads];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const uint4 left = *reinterpret_cast<const uint4*>(q.codes + t * q.pitch + column);
      sums[t] = dot4(left.x, right.x, sums[t]);
      sums[t] = dot4(left.y, right.y, sums[t]);
      sums[t] = dot4(left.z, right.z, sums[t]);
      sums[t] = dot4(left.w, right.w, sums[t]);
    }
    fetch(step + kDepth);
    if (kOutliers && has_outliers) {
      const unsigned flagged = q.flags[column / 32] >> (column % 32) & 0xffffu;
      if (group_any(__popc(flagged) >= kManyColumns)) {
        multiply_all(corrections, q, column, right);
      } else {
        multiply_flagged(corrections, q, column, right, flagged);
      }
    }
    if (++chunk == chunks) {
      chunk = 0;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int sum = group_sum<kLanes>(sums[t]);
        const float correction = kOutliers && has_outliers ? group_sum<kLanes>(corrections[t]) : 0.0f;
        if (parts == 1) {
          store(t, sum, correction);
        } else if (lane == 0) {
          part_sums[t][warp] = sum;
          part_corrections[t][warp] = correction;
        }
        sums[t] = 0;
        corrections[t] = 0.0f;
      }
      if (parts == 1) {
        row += stride;
        fetch_constants();
      }
    }
  }
  if (parts > 1) {
    __syncthreads();
    if (part == 0 && row < n) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        int sum = 0;
        float correction = 0.0f;
        for (int i = 0; i < parts; ++i) {
          sum += part_sums[t][warp + i];
          correction += part_corrections[t][warp + i];
        }
        store(t, sum, correction);
      }
    }
  }
}

// Warps that share a row, so that all multiprocessors have work.
int parts_of(int64_t n, int64_t k, int64_t warps) {
  const int64_t chunks = ceil_div(k, kChunk);
  int parts = 1;
  while (parts < kWarps && 2 * parts <= chunks && n * 2 * parts <= warps) {
    parts *= 2;
  }
  return parts;
}

template <class T, bool kOutliers, int kTokens>
void run(const Launch& launch, const Gemm8& p, float threshold) {
  const auto kernel = int8_rows<T, kOutliers, kTokens>;
  const int bytes = static_cast<int>(Quantized<T, kTokens>::bytes(p.k));
  static SharedMemoryLimit limit;
  limit.raise(launch, reinterpret_cast<const void*>(kernel), static_cast<int>(most_shared(launch.capability())));
  const int parts = parts_of(p.n, p.k, int64_t{launch.processors()} * kWarps);
  const dim3 blocks(launch.grid(ceil_div(p.n * parts, kWarps), 1));
  launch_dependent(kernel, {blocks, kThreads, bytes}, launch, "int8_linear", static_cast<const T*>(p.values), p.b,
                   static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), parts, threshold, p.b_absmax,
                   p.bias, p.bias_dtype, static_cast<T*>(p.out));
}

// Calls body with the number of rows that the kernel is built for, as an integral constant.
template <class Body>
auto with_tokens(int64_t m, Body&& body) {
  return m == 1 ? body(std::integral_constant<int, 1>{}) : body(std::integral_constant<int, kMostTokens>{});
}

}  // namespace

bool int8_gemv_fits(int64_t m, int64_t n, int64_t k, int dtype, int capability) {
  // Beyond the last row a warp still adds to its number, an int.
  constexpr int64_t kMostRows = int64_t{1} << 30;
  if (capability < 80 || m < 1 || m > kMostTokens || n < 1 || n > kMostRows || k < 1 || k > kMostColumns ||
      k % kOwn != 0) {
    return false;
  }
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto type) {
    with_tokens(
        m, [&](auto tokens) { bytes = Quantized<typename decltype(type)::type, decltype(tokens)::value>::bytes(k); });
  });
  return bytes <= most_shared(capability);
}

void int8_gemv(const Launch& launch, const Gemm8& p, float threshold) {
  with_dtype(p.dtype, [&](auto type) {
    with_tokens(p.m, [&](auto tokens) {
      using T = typename decltype(type)::type;
      constexpr int kTokens = decltype(tokens)::value;
      threshold > 0.0f ? run<T, true, kTokens>(launch, p, threshold) : run<T, false, kTokens>(launch, p, 0.0f);
    });
  });
  check_launch("int8_linear");
}

}  // namespace bnb_gpu
