// Rearrangements across vectors: transposed blocks, and sums across the lanes of several vectors at once.
#pragma once

#include "simd-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

#if defined(__AVX2__)
// Both instruction sets shuffle within parts of four lanes. From the first, or second, halves of the parts of two
// vectors: lanes a0 b0 a1 b1, and lanes a0 a1 b0 b1.
#if defined(__AVX512F__)
BNB_FN F32 zip_low(F32 a, F32 b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
BNB_FN F32 zip_high(F32 a, F32 b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
BNB_FN F32 join_low(F32 a, F32 b) {
  return {_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
BNB_FN F32 join_high(F32 a, F32 b) {
  return {_mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
// Parts 0 and 2, or 1 and 3, of two vectors.
BNB_FN F32 even_parts(F32 a, F32 b) { return {_mm512_shuffle_f32x4(a.v, b.v, 0x88)}; }
BNB_FN F32 odd_parts(F32 a, F32 b) { return {_mm512_shuffle_f32x4(a.v, b.v, 0xdd)}; }
#else
BNB_FN F32 zip_low(F32 a, F32 b) { return {_mm256_unpacklo_ps(a.v, b.v)}; }
BNB_FN F32 zip_high(F32 a, F32 b) { return {_mm256_unpackhi_ps(a.v, b.v)}; }
BNB_FN F32 join_low(F32 a, F32 b) {
  return {_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a.v), _mm256_castps_pd(b.v)))};
}
BNB_FN F32 join_high(F32 a, F32 b) {
  return {_mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a.v), _mm256_castps_pd(b.v)))};
}
BNB_FN F32 even_parts(F32 a, F32 b) { return {_mm256_permute2f128_ps(a.v, b.v, 0x20)}; }
BNB_FN F32 odd_parts(F32 a, F32 b) { return {_mm256_permute2f128_ps(a.v, b.v, 0x31)}; }
#endif

// Lane j of vector i becomes lane i of vector j.
BNB_FN void transpose(F32 (&v)[kLanes]) {
  F32 parts[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const F32 low01 = zip_low(v[i], v[i + 1]), high01 = zip_high(v[i], v[i + 1]);
    const F32 low23 = zip_low(v[i + 2], v[i + 3]), high23 = zip_high(v[i + 2], v[i + 3]);
    parts[i] = join_low(low01, low23);
    parts[i + 1] = join_high(low01, low23);
    parts[i + 2] = join_low(high01, high23);
    parts[i + 3] = join_high(high01, high23);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const F32 even = even_parts(parts[j], parts[4 + j]), odd = odd_parts(parts[j], parts[4 + j]);
#if defined(__AVX512F__)
    const F32 later_even = even_parts(parts[8 + j], parts[12 + j]), later_odd = odd_parts(parts[8 + j], parts[12 + j]);
    v[j] = even_parts(even, later_even);
    v[4 + j] = even_parts(odd, later_odd);
    v[8 + j] = odd_parts(even, later_even);
    v[12 + j] = odd_parts(odd, later_odd);
#else
    v[j] = even;
    v[4 + j] = odd;
#endif
  }
}

#define BNB_FOR_INTEGERS(name) \
  BNB_FN I32 name(I32 a, I32 b) { return bits_of(name(float_of(a), float_of(b))); }
BNB_FOR_INTEGERS(zip_low)
BNB_FOR_INTEGERS(zip_high)
BNB_FOR_INTEGERS(join_low)
BNB_FOR_INTEGERS(join_high)
BNB_FOR_INTEGERS(even_parts)
BNB_FOR_INTEGERS(odd_parts)
#undef BNB_FOR_INTEGERS

// Lane i is the sum of the lanes of vector i. Each step adds halves and packs two vectors into one.
template <class V>
BNB_FN V sums_of_lanes(const V* v) {
  V parts[kLanes / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    const V* const from = v + 4 * i;
    const V first = zip_low(from[0], from[1]) + zip_high(from[0], from[1]);
    const V second = zip_low(from[2], from[3]) + zip_high(from[2], from[3]);
    parts[i] = join_low(first, second) + join_high(first, second);
  }
  const V low = even_parts(parts[0], parts[1]) + odd_parts(parts[0], parts[1]);
#if defined(__AVX512F__)
  const V high = even_parts(parts[2], parts[3]) + odd_parts(parts[2], parts[3]);
  return even_parts(low, high) + odd_parts(low, high);
#else
  return low;
#endif
}
#elif defined(BNB_NEON)
BNB_FN void transpose(F32 (&v)[kLanes]) {
  const auto wide = [](float32x4_t a) { return vreinterpretq_f64_f32(a); };
  const auto narrow = [](float64x2_t a) { return vreinterpretq_f32_f64(a); };
  const float32x4_t even01 = vtrn1q_f32(v[0].v, v[1].v), odd01 = vtrn2q_f32(v[0].v, v[1].v);
  const float32x4_t even23 = vtrn1q_f32(v[2].v, v[3].v), odd23 = vtrn2q_f32(v[2].v, v[3].v);
  v[0].v = narrow(vtrn1q_f64(wide(even01), wide(even23)));
  v[1].v = narrow(vtrn1q_f64(wide(odd01), wide(odd23)));
  v[2].v = narrow(vtrn2q_f64(wide(even01), wide(even23)));
  v[3].v = narrow(vtrn2q_f64(wide(odd01), wide(odd23)));
}

BNB_FN F32 sums_of_lanes(const F32* v) { return {vpaddq_f32(vpaddq_f32(v[0].v, v[1].v), vpaddq_f32(v[2].v, v[3].v))}; }
BNB_FN I32 sums_of_lanes(const I32* v) { return {vpaddq_s32(vpaddq_s32(v[0].v, v[1].v), vpaddq_s32(v[2].v, v[3].v))}; }
#else
BNB_FN void transpose(F32 (&)[kLanes]) {}

BNB_FN F32 sums_of_lanes(const F32* v) { return v[0]; }
#endif

BNB_FN void transpose(I32 (&v)[kLanes]) {
  F32 floats[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    floats[i] = float_of(v[i]);
  }
  transpose(floats);
  for (int i = 0; i < kLanes; ++i) {
    v[i] = bits_of(floats[i]);
  }
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
