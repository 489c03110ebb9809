// Passing through a tensor in tiles, to quantize it in blocks: a lane holds 8 neighbouring values, one 16-byte load for
// 16-bit types.
#pragma once

#include "block.h"

namespace bnb_gpu {

constexpr int kPerLane = 8;
constexpr int kPerGroup = kPerLane * kLanes;

// Vectors of a lane that are on their way together.
template <class T>
constexpr int kTileUnroll = sizeof(T) == 4 ? 2 : 4;

// Values of a tile for so many threads.
template <class T, int kThreads>
constexpr int kTile = kThreads * kPerLane * kTileUnroll<T>;

// A lane's values; zeros beyond the end of the tensor.
template <class T>
__device__ __forceinline__ Words<T, kPerLane> load_values(const T* x, int64_t begin, int64_t count) {
  if (begin + kPerLane <= count) {
    return words_of(load_streaming<T, kPerLane>(x + begin));
  }
  Vector<T, kPerLane> values;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values.values[i] = begin + i < count ? x[begin + i] : from_float<T>(0.0f);
  }
  return words_of(values);
}

// Takes tiles in turn. `finish(begin, values, whole)` gets a lane's vectors, which lie kPerGroup values apart from
// `begin` on; only of the last tile it has to look where the tensor ends. All lanes call it.
template <class T, int kThreads, class Finish>
__device__ __forceinline__ void for_each_tile(const T* __restrict__ x, int64_t count, Finish&& finish) {
  constexpr int kUnroll = kTileUnroll<T>;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile<T, kThreads>; tile < count;
       tile += static_cast<int64_t>(gridDim.x) * kTile<T, kThreads>) {
    const int64_t begin = tile + group * (kPerGroup * kUnroll) + lane * kPerLane;
    Words<T, kPerLane> values[kUnroll];
    if (tile + kTile<T, kThreads> <= count) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        values[u] = words_of(load_streaming<T, kPerLane>(x + begin + u * kPerGroup));
      }
      finish(begin, values, true);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        values[u] = load_values(x, begin + u * kPerGroup, count);
      }
      finish(begin, values, false);
    }
  }
}

// The same for blocks that several groups of lanes share: `finish(first, values, bits, has_nan)` gets the bits of the
// block's absmax besides, and whether a NaN is among the lane's values.
template <class T, int kThreads, int kBlock, class Finish>
__device__ __forceinline__ void for_each_block(const T* __restrict__ x, int64_t count, Finish&& finish) {
  constexpr int kGroups = kBlock / kPerGroup, kStep = kThreads * kPerLane;
  __shared__ unsigned largest[kThreads / kLanes];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kStep; tile < count;
       tile += static_cast<int64_t>(gridDim.x) * kStep) {
    const int64_t first = tile + static_cast<int64_t>(threadIdx.x) * kPerLane;
    const Words<T, kPerLane> values = load_values(x, first, count);
    const Largest own = largest_magnitude(values);
    unsigned bits = group_max<kLanes>(own.bits);
    __syncthreads();
    if (lane == 0) {
      largest[group] = bits;
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      bits = max(bits, largest[group / kGroups * kGroups + g]);
    }
    finish(first, values, bits, own.has_nan);
  }
}

}  // namespace bnb_gpu
