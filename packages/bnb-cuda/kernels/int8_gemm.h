// What the int8 products share: the matrix unit, and the way from integers to the result.
#pragma once

#include "gemm4.h"

namespace bnb_gpu {

constexpr float kProductScale = 1.0f / 16129.0f;

// d += a @ b for one 16 x 8 x 32 tile of int8, exact.
__device__ __forceinline__ void multiply_tile8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if BNB_DEVICE_ARCH >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The float32 result of one element; `corrected` is the product of the outlier columns.
__device__ __forceinline__ float scaled_product(int product, float a_absmax, float b_absmax, float corrected,
                                                float bias) {
  return __int2float_rn(product) * (a_absmax * b_absmax * kProductScale) + corrected + bias;
}

// Sum over the outlier columns of one element; `count` is zero without outliers.
template <class T>
__device__ __forceinline__ float outlier_product(const T* values, const int8_t* codes, const int* columns, int count,
                                                 float b_absmax) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const int column = columns[i];
    sum = __fmaf_rn(to_float(values[column]), static_cast<float>(codes[column]), sum);
  }
  return sum * (b_absmax * (1.0f / 127.0f));
}

template <class Body>
void with_outliers(const Gemm8& p, Body&& body) {
  if (p.outliers.count != nullptr) {
    body(std::integral_constant<bool, true>{});
  } else {
    body(std::integral_constant<bool, false>{});
  }
}

}  // namespace bnb_gpu
