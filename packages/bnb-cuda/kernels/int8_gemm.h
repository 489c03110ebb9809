// What the int8 products share: the matrix unit, and the way from integers to the result.
#pragma once

#include <type_traits>

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

// What the outlier columns give to one element; `sum` is that of values times codes, of a row with this absmax.
__device__ __forceinline__ float correction_of(float sum, float b_absmax) { return sum * (b_absmax * (1.0f / 127.0f)); }

// The same for columns of which there is a list; `count` is zero without outliers.
template <class T>
__device__ __forceinline__ float outlier_product(const T* values, const int8_t* codes, const int* columns, int count,
                                                 float b_absmax) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const int column = columns[i];
    sum = __fmaf_rn(to_float(values[column]), static_cast<float>(codes[column]), sum);
  }
  return correction_of(sum, b_absmax);
}

// Codes 2 kHalf and 2 kHalf + 1 of four as 16-bit numbers.
template <class T, int kHalf>
__device__ __forceinline__ unsigned widen_codes(unsigned codes) {
  constexpr unsigned kSelect = kHalf == 0 ? 0x4140 : 0x4342;
  unsigned pair = 0;
#if BNB_DEVICE_ARCH >= 800
  if constexpr (std::is_same_v<T, half_t>) {
    // 1024 + 128 + code is the low byte under the bits of 1024.
    pair = __byte_perm(codes ^ 0x80808080u, 0x64646464u, kSelect);
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(pair), "r"(0x64806480u));
  } else {
    // Seven bits have room under the bits of 128; the eighth makes 256 of the 128 that are subtracted.
    pair = __byte_perm(codes, 0x43434343u, kSelect);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(pair)
        : "r"(pair & 0xff80ff80u), "r"(0xbf80bf80u), "r"(pair & 0xff7fff7fu));
  }
#endif
  return pair;
}

// One of four codes as float32: 2^23 + 128 + code has its low byte under the bits of 2^23.
template <int kByte>
__device__ __forceinline__ float code_value(unsigned codes) {
  return __uint_as_float(__byte_perm(codes ^ 0x80808080u, 0x4b000000u, 0x7440 | kByte)) - 8388736.0f;
}

// What a value is beyond its code in a row with this absmax over 127.
__device__ __forceinline__ float rest_of_code(float value, float code, float scale) {
  return __fmaf_rn(-code, scale, value);
}

// The same for the values of a pair of columns.
template <class T, int kHalf>
__device__ __forceinline__ unsigned rest_of_codes(unsigned values, unsigned codes, float scale) {
  const float2 pair = unpack_pair<T>(values);
  return pack_pair<T>(rest_of_code(pair.x, code_value<2 * kHalf>(codes), scale),
                      rest_of_code(pair.y, code_value<2 * kHalf + 1>(codes), scale));
}

// Flags of `kCount` columns from a multiple of it on, none beyond the last column.
template <int kCount>
__device__ __forceinline__ unsigned flags_of(const unsigned* flags, int column, int k) {
  return column < k ? flags[column / 32] >> (column % 32) & ((1u << kCount) - 1) : 0u;
}

// All bits of those of two 16-bit numbers whose flags are set.
__device__ __forceinline__ unsigned pair_mask(unsigned flags) { return ((flags & 1u) | (flags & 2u) << 15) * 0xffffu; }

template <class Body>
void with_outliers(const Gemm8& p, Body&& body) {
  if (p.outliers.count != nullptr) {
    body(std::integral_constant<bool, true>{});
  } else {
    body(std::integral_constant<bool, false>{});
  }
}

}  // namespace bnb_gpu
