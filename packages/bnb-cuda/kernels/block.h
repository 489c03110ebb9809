// Moving vectors of elements between memory and registers, and reductions over lanes.
#pragma once

#include <bnb/dtypes.h>
#include <bnb/portable.h>

#include <type_traits>

#include "lanes.h"
#include "vendor.h"

namespace bnb_gpu {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half_t value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat16_t value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float value) {
  return __float2bfloat16_rn(value);
}

#ifndef BNB_HIP
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// `kCount` elements that move as one or more 16-byte accesses (or one smaller access).
template <class T, int kCount>
struct alignas(sizeof(T) * kCount >= 16 ? 16 : sizeof(T) * kCount) Vector {
  T values[kCount];
};

// Reads from global memory what no one writes meanwhile.
template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load_kept(const T* from) {
  static_assert(sizeof(T) * kCount % 16 == 0, "whole vectors");
  Vector<T, kCount> result;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof result / 16); ++i) {
    reinterpret_cast<uint4*>(&result)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
  return result;
}

// Reads from global memory with a hint that the data is used once.
template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load_streaming(const T* from) {
  Vector<T, kCount> result;
  constexpr int kBytes = sizeof(T) * kCount;
#ifndef BNB_HIP
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(&result)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    }
    return result;
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(&result) = __ldcs(reinterpret_cast<const uint2*>(from));
    return result;
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<unsigned*>(&result) = __ldcs(reinterpret_cast<const unsigned*>(from));
    return result;
  }
#endif
  result = *reinterpret_cast<const Vector<T, kCount>*>(from);
  return result;
}

template <class T, int kCount>
__device__ __forceinline__ void store_streaming(T* to, const Vector<T, kCount>& data) {
  constexpr int kBytes = sizeof(T) * kCount;
#ifndef BNB_HIP
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      __stcs(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&data)[i]);
    }
    return;
  } else if constexpr (kBytes == 8) {
    __stcs(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(&data));
    return;
  } else if constexpr (kBytes == 4) {
    __stcs(reinterpret_cast<unsigned*>(to), *reinterpret_cast<const unsigned*>(&data));
    return;
  }
#endif
  *reinterpret_cast<Vector<T, kCount>*>(to) = data;
}

// Elements as words in registers. Arrays of small elements that live long are taken apart by the compiler.
template <class T, int kCount>
struct Words {
  static constexpr int kWords = static_cast<int>(sizeof(T)) * kCount / 4;
  unsigned words[kWords];

  __device__ __forceinline__ Lanes<kCount> floats() const {
    return each<kCount>([&](int i) {
      if constexpr (std::is_same_v<T, float>) {
        return bnb::float_of(words[i]);
      } else if constexpr (std::is_same_v<T, bfloat16_t>) {
        return bnb::float_of(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
      } else {
        const unsigned short bits = static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)));
        T value;
        memcpy(&value, &bits, sizeof value);
        return to_float(value);
      }
    });
  }

  // Makes an element zero.
  __device__ __forceinline__ void clear(int i) {
    constexpr int kPerWord = 4 / sizeof(T), kBits = 32 / kPerWord;
    constexpr unsigned kMask = kBits == 32 ? ~0u : (1u << kBits % 32) - 1;
    words[i / kPerWord] &= ~(kMask << (i % kPerWord * kBits));
  }

  __device__ __forceinline__ uint8_t byte(int i) const { return static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4))); }

  // Entries of a table of 256, for elements that are bytes.
  __device__ __forceinline__ Lanes<kCount> looked_up(const float* table) const {
    static_assert(sizeof(T) == 1, "bytes are indices");
    return each<kCount>([&](int i) { return table[words[i / 4] >> (8 * (i % 4)) & 0xffu]; });
  }
};

template <class T, int kCount>
__device__ __forceinline__ Words<T, kCount> words_of(const Vector<T, kCount>& values) {
  Words<T, kCount> result;
  memcpy(&result, &values, sizeof result);
  return result;
}

template <class T, int kCount>
__device__ __forceinline__ void store_streaming(T* to, const Words<T, kCount>& data) {
  static_assert(Words<T, kCount>::kWords == 2, "eight bytes");
#ifndef BNB_HIP
  __stcs(reinterpret_cast<uint2*>(to), make_uint2(data.words[0], data.words[1]));
#else
  *reinterpret_cast<uint2*>(to) = make_uint2(data.words[0], data.words[1]);
#endif
}

// Writes a lane's codes at `begin`, as far as the tensor goes. `aligned`: that is a multiple of 8 bytes.
__device__ __forceinline__ void store_own(uint8_t* to, int64_t begin, int64_t count, bool aligned,
                                          const Words<uint8_t, 8>& codes) {
  if (aligned && begin + 8 <= count) {
    store_streaming(to + begin, codes);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (begin + i < count) {
      to[begin + i] = codes.byte(i);
    }
  }
}

// The larger number; NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if BNB_DEVICE_ARCH >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a == a && b == b ? fmaxf(a, b) : bnb::float_of(0x7fc00000u);
#endif
}

// Two elements of 16 bits.
template <class T>
using Pair = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;

// Whether elements are compared two at a time.
#ifdef BNB_HIP
template <class T>
constexpr bool kInPairs = false;
#else
template <class T>
constexpr bool kInPairs = sizeof(T) == 2;
#endif

// The magnitudes of the two elements of a word.
template <class T>
__device__ __forceinline__ Pair<T> pair_magnitudes(unsigned word) {
  Pair<T> pair;
  memcpy(&pair, &word, sizeof pair);
  return __habs2(pair);
}

// The larger magnitudes, element by element; NaN does not count.
template <class T, int kCount>
__device__ __forceinline__ Words<T, kCount> larger_magnitudes(const Words<T, kCount>& a, const Words<T, kCount>& b) {
  Words<T, kCount> result;
  if constexpr (kInPairs<T>) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const Pair<T> larger = __hmax2(pair_magnitudes<T>(a.words[i]), pair_magnitudes<T>(b.words[i]));
      memcpy(result.words + i, &larger, sizeof larger);
    }
  } else {
    const Lanes<kCount> x = a.floats(), y = b.floats();
    Vector<T, kCount> larger;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      larger.values[i] = from_float<T>(fmaxf(fabsf(x.values[i]), fabsf(y.values[i])));
    }
    result = words_of(larger);
  }
  return result;
}

// Bits of the largest magnitude of the values; NaN does not count.
template <class T, int kCount>
__device__ __forceinline__ unsigned largest_number_bits(const Words<T, kCount>& values) {
  float largest = 0.0f;
  if constexpr (kInPairs<T>) {
    const unsigned zero = 0;
    Pair<T> all;
    memcpy(&all, &zero, sizeof all);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      all = __hmax2(all, pair_magnitudes<T>(values.words[i]));
    }
    largest = fmaxf(to_float(all.x), to_float(all.y));
  } else {
    const Lanes<kCount> numbers = values.floats();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      largest = fmaxf(largest, fabsf(numbers.values[i]));
    }
  }
  return bnb::bits_of(largest);
}

// Bits of the largest magnitude of the values, and whether there is a NaN, which does not count, among them.
struct Largest {
  unsigned bits;
  bool has_nan;
};

template <class T, int kCount>
__device__ __forceinline__ Largest largest_magnitude(const Words<T, kCount>& values) {
  float largest = 0.0f;
  if constexpr (kInPairs<T>) {
    Pair<T> all = pair_magnitudes<T>(values.words[0]);
#pragma unroll
    for (int i = 1; i < kCount / 2; ++i) {
      all = __hmax2_nan(all, pair_magnitudes<T>(values.words[i]));
    }
    largest = max_or_nan(to_float(all.x), to_float(all.y));
  } else {
    const Lanes<kCount> numbers = values.floats();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      largest = max_or_nan(largest, fabsf(numbers.values[i]));
    }
  }
  const bool has_nan = largest != largest;
  return {has_nan ? largest_number_bits(values) : bnb::bits_of(largest), has_nan};
}

// Largest value over groups of `kWidth` neighbouring lanes, known to all of them.
template <int kWidth, class T>
__device__ __forceinline__ T group_max(T value) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask >>= 1) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

template <int kWidth, class T>
__device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask >>= 1) {
    value += shuffle_xor(value, mask);
  }
  return value;
}

// Largest value over a thread block of up to 32 groups of lanes, known to all threads. `scratch` has
// room for 32 values; the caller synchronises before it is used again.
template <class T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
  value = group_max<kLanes>(value);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  if (lane == 0) {
    scratch[group] = value;
  }
  __syncthreads();
  value = lane < groups ? scratch[lane] : scratch[0];
  return group_max<kLanes>(value);
}

template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  value = group_sum<kLanes>(value);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  if (lane == 0) {
    scratch[group] = value;
  }
  __syncthreads();
  value = lane < groups ? scratch[lane] : T(0);
  return group_sum<kLanes>(value);
}

}  // namespace bnb_gpu
