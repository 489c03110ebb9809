// Arithmetic on the few values that a lane holds, for formulas that are written for any type of value
// (bnb/rules.h). Quotients and roots are those of IEEE; values share one test of whether the short way is
// exact, so that nothing waits between them.
#pragma once

#include <bnb/portable.h>

#include "vendor.h"

namespace bnb_gpu {

template <int kCount>
struct Lanes {
  float values[kCount];

  __device__ __forceinline__ static Lanes all(float value) {
    Lanes lanes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      lanes.values[i] = value;
    }
    return lanes;
  }
};

template <int kCount, class Body>
__device__ __forceinline__ Lanes<kCount> each(Body&& body) {
  Lanes<kCount> lanes;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    lanes.values[i] = body(i);
  }
  return lanes;
}

template <int kCount>
__device__ __forceinline__ Lanes<kCount> operator+(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each<kCount>([&](int i) { return a.values[i] + b.values[i]; });
}

template <int kCount>
__device__ __forceinline__ Lanes<kCount> operator-(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each<kCount>([&](int i) { return a.values[i] - b.values[i]; });
}

template <int kCount>
__device__ __forceinline__ Lanes<kCount> operator*(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each<kCount>([&](int i) { return a.values[i] * b.values[i]; });
}

template <int kCount>
__device__ __forceinline__ Lanes<kCount> sign(const Lanes<kCount>& a) {
  return each<kCount>([&](int i) { return static_cast<float>((a.values[i] > 0.0f) - (a.values[i] < 0.0f)); });
}

// --- quotients and roots -----------------------------------------------------------------------------

// Bits of 2^exponent.
__device__ constexpr unsigned power_of_two_bits(int exponent) { return static_cast<unsigned>(exponent + 127) << 23; }

__device__ __forceinline__ float approximate_reciprocal(float value) {
#ifdef BNB_HIP
  return __frcp_rn(value);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}

__device__ __forceinline__ float approximate_reciprocal_root(float value) {
#ifdef BNB_HIP
  return __frsqrt_rn(value);
#else
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}

// Whether the reciprocal of a positive number with these bits is a normal number.
__device__ __forceinline__ bool has_normal_reciprocal(unsigned bits) {
  return bits - power_of_two_bits(-126) < power_of_two_bits(126) - power_of_two_bits(-126);
}

// The reciprocal, rounded correctly where it is a normal number; that of zero is NaN.
__device__ __forceinline__ float refined_reciprocal(float value) {
  const float first = approximate_reciprocal(value);
  return __fmaf_rn(first, __fmaf_rn(-value, first, 1.0f), first);
}

// Calls, which keep the rarely needed out of the way.
template <int kCount>
__device__ __noinline__ Lanes<kCount> divide_any(Lanes<kCount> a, Lanes<kCount> b) {
  return each<kCount>([&](int i) { return a.values[i] / b.values[i]; });
}

template <int kCount>
__device__ __noinline__ Lanes<kCount> root_of_any(Lanes<kCount> a) {
  return each<kCount>([&](int i) { return sqrtf(a.values[i]); });
}

// The quotient from a refined reciprocal, corrected by the remainder (Markstein 1990): rounded correctly as
// long as neither the remainder nor the quotient leaves the range of normal numbers.
template <int kCount>
__device__ __forceinline__ Lanes<kCount> operator/(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  constexpr unsigned kLeastA = power_of_two_bits(-100), kSpanA = power_of_two_bits(60) - kLeastA;
  constexpr unsigned kLeastB = power_of_two_bits(-60), kSpanB = power_of_two_bits(24) - kLeastB;
  bool exact = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const unsigned magnitude = bnb::bits_of(a.values[i]) & 0x7fffffffu;
    exact &= (magnitude == 0) | (magnitude - kLeastA <= kSpanA);
    exact &= bnb::bits_of(b.values[i]) - kLeastB <= kSpanB;
  }
  if (!exact) {
    return divide_any(a, b);
  }
  return each<kCount>([&](int i) {
    const float divisor = b.values[i], reciprocal = refined_reciprocal(divisor);
    const float quotient = a.values[i] * reciprocal;
    return __fmaf_rn(reciprocal, __fmaf_rn(-divisor, quotient, a.values[i]), quotient);
  });
}

// The root from an approximate reciprocal root, corrected by the remainder.
template <int kCount>
__device__ __forceinline__ Lanes<kCount> sqrt(const Lanes<kCount>& a) {
  constexpr unsigned kLeast = power_of_two_bits(-100), kSpan = power_of_two_bits(100) - kLeast;
  bool exact = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    exact &= bnb::bits_of(a.values[i]) - kLeast <= kSpan;
  }
  if (!exact) {
    return root_of_any(a);
  }
  return each<kCount>([&](int i) {
    const float value = a.values[i], inverse = approximate_reciprocal_root(value), root = value * inverse;
    return __fmaf_rn(__fmaf_rn(-root, root, value), 0.5f * inverse, root);
  });
}

}  // namespace bnb_gpu
