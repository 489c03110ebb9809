// What kernels share on top of the vector types of their instruction set.
#pragma once

#include <bnb/quant.h>

#include "parallel.h"

// BNB_FN for members that are not static. Small functions that have many callers the compiler would call, even in inner
// loops.
#if defined(_MSC_VER)
#define BNB_MEMBER __forceinline
#else
#define BNB_MEMBER inline __attribute__((always_inline))
#endif

namespace bnb_cpu {
namespace BNB_ISA {

// parallel_for with any callable body(begin, end).
template <class Body>
void parallel(int threads, int64_t count, int64_t grain, const Body& body) {
  parallel_for(
      threads, count, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// A thread must have about this many elements to be worth waking.
constexpr int64_t kElementsPerThread = 16384;

// Number of items of `size` elements that make a thread's share.
BNB_FN int64_t grain_of(int64_t size) { return size < kElementsPerThread ? kElementsPerThread / size : 1; }

// Asks for the cache line at `distance` bytes from `from`, which need not exist.
BNB_FN void prefetch(const void* from, int64_t distance) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(distance);
#if defined(__AVX2__)
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
#elif defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(address));
#endif
}

BNB_FN int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) for the element type that `dtype` stands for.
template <class Body>
void with_dtype(int dtype, const Body& body) {
  switch (static_cast<bnb::Dtype>(dtype)) {
    case bnb::Dtype::kFloat32:
      return body(Type<float>{});
    case bnb::Dtype::kFloat16:
      return body(Type<bnb::Half>{});
    case bnb::Dtype::kBFloat16:
      return body(Type<bnb::BFloat16>{});
  }
}

// Results of this size and more go past the caches: by the time they are read again they would have
// been evicted, and an ordinary store first reads the line that it overwrites.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// Whether whole vectors at multiples of `stride` elements from `out` may be streamed.
template <class T>
BNB_FN bool should_stream(const T* out, int64_t count, int64_t stride) {
  return count * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && stride % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0;
}

template <bool kStream, class T>
BNB_FN void put(T* p, F32 a) {
  if constexpr (kStream) {
    stream(p, a);
  } else {
    store(p, a);
  }
}

// Largest magnitude of `count` values as bits, see bnb/quant.h. NaN wins, or counts as zero.
template <bool kSkipNan, class T>
BNB_FN uint32_t absmax_bits(const T* x, int64_t count) {
  const I32 magnitude_mask = splat(0x7fffffff), infinity = splat(0x7f800000);
  const auto bits_at = [&](int64_t i) {
    const I32 bits = bits_of(load(x + i)) & magnitude_mask;
    return kSkipNan ? select(bits > infinity, splat(0), bits) : bits;
  };
  // Two chains, since each maximum waits for the one before.
  I32 even = splat(0), odd = splat(0);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    even = max(even, bits_at(i));
    odd = max(odd, bits_at(i + kLanes));
  }
  if (i + kLanes <= count) {
    even = max(even, bits_at(i));
    i += kLanes;
  }
  uint32_t most = static_cast<uint32_t>(reduce_max(max(even, odd)));
  for (; i < count; ++i) {
    const float value = bnb::to_float(x[i]);
    const uint32_t bits = kSkipNan ? bnb::magnitude_bits_or_zero(value) : bnb::magnitude_bits(value);
    most = bits > most ? bits : most;
  }
  return most;
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
