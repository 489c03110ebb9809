// 8-bit block-wise codes under a codebook of up to 256 values, and back.
#include <type_traits>

#include "codes8.h"
#include "kernels.h"
#include "tiles.h"

namespace bnb_gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kManyThreads = 512;
// Values of a lane that are decoded in turn.
constexpr int kInTurn = 32;

template <int kCount>
__device__ __forceinline__ Words<uint8_t, kCount> load_codes(const uint8_t* codes, int64_t begin, int64_t count) {
  if (begin + kCount <= count) {
    return words_of(load_streaming<uint8_t, kCount>(codes + begin));
  }
  Words<uint8_t, kCount> result = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (begin + i < count) {
      result.words[i / 4] |= static_cast<unsigned>(codes[begin + i]) << (8 * (i % 4));
    }
  }
  return result;
}

// Codes of 8 values of a block with this absmax.
template <class T>
__device__ __forceinline__ Words<uint8_t, kPerLane> encode(const Words<T, kPerLane>& values, unsigned absmax_bits,
                                                           bool has_nan, const Encoder8& encoder) {
  return encoder(values.floats().values, bnb::float_of(absmax_bits), has_nan);
}

// Blocks of kBlock = 64 ... 256 values, each in kBlock / 8 lanes.
template <class T, int kBlock>
__global__ void __launch_bounds__(kThreads)
    quantize8_lanes(const T* __restrict__ x, int64_t count, const float* __restrict__ code, int code_size,
                    uint8_t* __restrict__ codes, float* __restrict__ absmax) {
  __shared__ Encoder8::Storage storage;
  const Encoder8 encoder(storage, code, code_size);
  const int lane = threadIdx.x % kLanes;
  for_each_tile<T, kThreads>(x, count, [&](int64_t begin, const auto& values, bool whole) {
    float* const scales = absmax + begin / kBlock;
#pragma unroll
    for (int u = 0; u < kTileUnroll<T>; ++u) {
      const Largest own = largest_magnitude(values[u]);
      const unsigned bits = group_max<kBlock / kPerLane>(own.bits);
      const Words<uint8_t, kPerLane> out = encode(values[u], bits, own.has_nan, encoder);
      if (whole) {
        store_streaming(codes + begin + u * kPerGroup, out);
      } else {
        store_own(codes, begin + u * kPerGroup, count, true, out);
      }
      if ((whole || begin + u * kPerGroup < count) && lane % (kBlock / kPerLane) == 0) {
        scales[u * (kPerGroup / kBlock)] = bnb::float_of(bits);
      }
    }
  });
}

// Blocks of kBlock = 512 ... 4096 values, each in kBlock / 8 threads.
template <class T, int kBlock>
__global__ void __launch_bounds__(kManyThreads)
    quantize8_groups(const T* __restrict__ x, int64_t count, const float* __restrict__ code, int code_size,
                     uint8_t* __restrict__ codes, float* __restrict__ absmax) {
  __shared__ Encoder8::Storage storage;
  const Encoder8 encoder(storage, code, code_size);
  for_each_block<T, kManyThreads, kBlock>(
      x, count, [&](int64_t first, const auto& values, unsigned bits, bool has_nan) {
        store_own(codes, first, count, true, encode(values, bits, has_nan, encoder));
        if (first < count && first % kBlock == 0) {
          absmax[first / kBlock] = bnb::float_of(bits);
        }
      });
}

// Any block size: a thread block takes a block of values, in two passes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize8_any(const T* __restrict__ x, int64_t count, int64_t blocksize, const float* __restrict__ code,
                  int code_size, uint8_t* __restrict__ codes, float* __restrict__ absmax) {
  __shared__ Encoder8::Storage storage;
  __shared__ unsigned scratch[kLanes];
  const Encoder8 encoder(storage, code, code_size);
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t begin = block * blocksize, end = begin + blocksize < count ? begin + blocksize : count;
    unsigned bits = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      bits = max(bits, bnb::magnitude_bits_or_zero(to_float(x[i])));
    }
    bits = block_max(bits, scratch);
    const float scale = bnb::float_of(bits), inverse = 1.0f / scale;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      codes[i] = static_cast<uint8_t>(encoder.any(to_float(x[i]) * inverse));
    }
    if (threadIdx.x == 0) {
      absmax[block] = scale;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize8(const uint8_t* __restrict__ codes, const float* __restrict__ absmax, const float* __restrict__ code,
                int code_size, int64_t count, int block_shift, T* __restrict__ out) {
  // One store of 16 bytes per lane, so that the stores of a group leave no gaps.
  constexpr int kOwn = 16 / sizeof(T), kUnroll = kInTurn / kOwn, kPerGroup = kOwn * kLanes;
  __shared__ float table[256];
  load_table(table, code, code_size);
  __syncthreads();
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  constexpr int kStep = kThreads * kInTurn;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kStep; tile < count;
       tile += static_cast<int64_t>(gridDim.x) * kStep) {
    const int64_t begin = tile + group * (kLanes * kInTurn) + lane * kOwn;
    Words<uint8_t, kOwn> words[kUnroll];
    float scales[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + u * kPerGroup;
      words[u] = load_codes<kOwn>(codes, first, count);
      scales[u] = first < count ? __ldg(absmax + (first >> block_shift)) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + u * kPerGroup;
      const Lanes<kOwn> numbers = words[u].looked_up(table) * Lanes<kOwn>::all(scales[u]);
      Vector<T, kOwn> values;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        values.values[i] = from_float<T>(numbers.values[i]);
      }
      if (first + kOwn <= count) {
        store_streaming<T, kOwn>(out + first, values);
      } else {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (first + i < count) {
            out[first + i] = values.values[i];
          }
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize8_any(const uint8_t* __restrict__ codes, const float* __restrict__ absmax, const float* __restrict__ code,
                    int code_size, int64_t count, int64_t blocksize, T* __restrict__ out) {
  __shared__ float table[256];
  load_table(table, code, code_size);
  __syncthreads();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    out[i] = from_float<T>(table[codes[i]] * absmax[i / blocksize]);
  }
}

template <class T, int kBlock>
void launch_quantize(const Launch& launch, const T* x, int64_t count, const float* code, int code_size, uint8_t* codes,
                     float* absmax) {
  constexpr bool kInLanes = kBlock <= kPerGroup;
  constexpr int kBlockThreads = kInLanes ? kThreads : kManyThreads;
  constexpr int kValues = kInLanes ? kTile<T, kThreads> : kManyThreads * kPerLane;
  const auto go = [&](auto kernel) {
    static ResidentGrid grid;
    kernel<<<grid(launch, reinterpret_cast<const void*>(kernel), kBlockThreads, ceil_div(count, kValues)),
             kBlockThreads, 0, launch.stream()>>>(x, count, code, code_size, codes, absmax);
  };
  if constexpr (kInLanes) {
    go(quantize8_lanes<T, kBlock>);
  } else {
    go(quantize8_groups<T, kBlock>);
  }
}

}  // namespace

void quantize_blockwise(const Launch& launch, const void* x, int dtype, int64_t count, int64_t blocksize,
                        const float* code, int code_size, uint8_t* codes, float* absmax) {
  if (count == 0) {
    return;
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(x);
    switch (blocksize) {
      case 64:
        return launch_quantize<T, 64>(launch, from, count, code, code_size, codes, absmax);
      case 128:
        return launch_quantize<T, 128>(launch, from, count, code, code_size, codes, absmax);
      case 256:
        return launch_quantize<T, 256>(launch, from, count, code, code_size, codes, absmax);
      case 512:
        return launch_quantize<T, 512>(launch, from, count, code, code_size, codes, absmax);
      case 1024:
        return launch_quantize<T, 1024>(launch, from, count, code, code_size, codes, absmax);
      case 2048:
        return launch_quantize<T, 2048>(launch, from, count, code, code_size, codes, absmax);
      case 4096:
        return launch_quantize<T, 4096>(launch, from, count, code, code_size, codes, absmax);
      default:
        quantize8_any<T><<<launch.grid(ceil_div(count, blocksize), 8), kThreads, 0, launch.stream()>>>(
            from, count, blocksize, code, code_size, codes, absmax);
    }
  });
  check_launch("quantize_blockwise");
}

void dequantize_blockwise(const Launch& launch, const uint8_t* codes, const float* absmax, const float* code,
                          int code_size, int64_t count, int64_t blocksize, void* out, int dtype) {
  if (count == 0) {
    return;
  }
  const int shift = exact_log2(blocksize);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = static_cast<T*>(out);
    if (shift >= 3) {
      dequantize8<T><<<launch.grid(ceil_div(count, kThreads * kInTurn), 32), kThreads, 0, launch.stream()>>>(
          codes, absmax, code, code_size, count, shift, to);
    } else {
      dequantize8_any<T><<<launch.grid(ceil_div(count, kThreads), 16), kThreads, 0, launch.stream()>>>(
          codes, absmax, code, code_size, count, blocksize, to);
    }
  });
  check_launch("dequantize_blockwise");
}

}  // namespace bnb_gpu
