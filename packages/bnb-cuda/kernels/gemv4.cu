// Product of a few rows with a 4-bit weight in plain float32 arithmetic, for what the matrix units do not
// take: float32 activations, foreign tables, odd sizes. A group of lanes computes one element.
#include "gemm4.h"

namespace bnb_gpu {
namespace {

constexpr int kThreads = 128;

template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    gemv4(const T* __restrict__ a, int64_t m, int64_t n, int64_t k, const uint8_t* __restrict__ packed,
          const Statistics statistics, int64_t blocksize, int block_shift, int nested_shift,
          const float* __restrict__ code, const void* __restrict__ bias, int bias_dtype, T* __restrict__ out) {
  __shared__ float nested_code[256];
  __shared__ float pairs[512];  // the two values of each byte
  const BlockScale<kNested> scale_of(statistics, nested_code, nested_shift);
  for (int i = threadIdx.x; i < 256; i += kThreads) {
    pairs[2 * i] = code[i >> 4];
    pairs[2 * i + 1] = code[i & 15];
  }
  __syncthreads();
  const int lane = threadIdx.x % kLanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  const auto block_of = [&](int64_t element) {
    return block_shift >= 0 ? element >> block_shift : element / blocksize;
  };
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes; unit < m * n;
       unit += groups) {
    const int64_t token = unit / n, row = unit % n;
    const T* values = a + token * k;
    const int64_t begin = row * k;
    float sum = 0.0f;
    if (k % 8 == 0 && block_shift >= 3) {
      // Four bytes, of one block, at a time.
      for (int64_t column = lane * 8; column < k; column += kLanes * 8) {
        const unsigned word = __ldg(reinterpret_cast<const unsigned*>(packed + (begin + column) / 2));
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = pairs + 2 * (word >> (8 * i) & 0xffu);
          part = __fmaf_rn(pair[0], to_float(values[column + 2 * i]), part);
          part = __fmaf_rn(pair[1], to_float(values[column + 2 * i + 1]), part);
        }
        sum = __fmaf_rn(part, scale_of((begin + column) >> block_shift), sum);
      }
    } else {
      for (int64_t column = lane; column < k; column += kLanes) {
        const int64_t element = begin + column;
        const float value = code[bnb::nibble_at(packed, element)] * scale_of(block_of(element));
        sum = __fmaf_rn(value, to_float(values[column]), sum);
      }
    }
    sum = group_sum<kLanes>(sum);
    if (lane == 0) {
      out[unit] = from_float<T>(sum + load_bias(bias, bias_dtype, row));
    }
  }
}

}  // namespace

void gemv_4bit(const Launch& launch, const Gemm4& p, const float* code) {
  if (p.m * p.n == 0) {
    return;
  }
  with_dtype(p.dtype, [&](auto type) {
    with_nested(p.statistics, [&](auto nested) {
      using T = typename decltype(type)::type;
      const unsigned grid = launch.grid(ceil_div(p.m * p.n, kThreads / kLanes), 16);
      gemv4<T, decltype(nested)::value><<<grid, kThreads, 0, launch.stream()>>>(
          static_cast<const T*>(p.a), p.m, p.n, p.k, p.packed, p.statistics, p.blocksize, exact_log2(p.blocksize),
          exact_log2(p.statistics.nested_blocksize), code, p.bias, p.bias_dtype, static_cast<T*>(p.out));
    });
  });
  check_launch("gemv_4bit");
}

}  // namespace bnb_gpu
