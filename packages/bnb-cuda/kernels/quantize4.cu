// Values to packed 4-bit codes and one absmax per block.
//
// A lane holds 8 neighbouring values, one 4-byte store of codes.
// Blocks of up to 256 values live in a group of lanes, larger ones in several groups of a thread block.
#include <type_traits>

#include "codes4.h"
#include "kernels.h"
#include "tiles.h"

namespace bnb_gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kManyThreads = 512;

// Writes the codes of 8 values, four bytes, fewer at the end of the tensor.
__device__ __forceinline__ void store_codes(uint8_t* packed, int64_t begin, int64_t count, unsigned word) {
  if (begin + kPerLane <= count) {
    __stcs(reinterpret_cast<unsigned*>(packed + begin / 2), word);
    return;
  }
  for (int i = 0; begin + 2 * i < count; ++i) {
    packed[begin / 2 + i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

// Where the code of the i-th value lies in a word.
__device__ __forceinline__ constexpr int code_shift(int i) { return i % 2 == 0 ? 4 * i + 4 : 4 * i - 4; }

// Rarely needed: a call keeps it out of the way.
template <int kType>
__device__ __noinline__ unsigned encode_any(Lanes<kPerLane> scaled) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    word |= Encoder4<kType>::any(scaled.values[i]) << code_shift(i);
  }
  return word;
}

// Codes of 8 values of a block with this absmax. All lanes of the group call this.
template <class T, int kType>
__device__ __forceinline__ unsigned encode(const Words<T, kPerLane>& values, unsigned absmax_bits,
                                           const Encoder4<kType>& encoder) {
  const Lanes<kPerLane> numbers = values.floats();
  const float absmax = bnb::float_of(absmax_bits);
  // The reciprocal of zero makes NaN of all values, whose codes are right.
  unsigned word = encoder(numbers * Lanes<kPerLane>::all(refined_reciprocal(absmax)));
  if (absmax_bits != 0 && !has_normal_reciprocal(absmax_bits)) {
    word = encode_any<kType>(numbers * Lanes<kPerLane>::all(1.0f / absmax));
  }
  return word;
}

// Blocks of kBlock = 32 ... 256 values, each in kBlock / 8 lanes.
template <class T, int kType, int kBlock>
__global__ void __launch_bounds__(kThreads, 5)
    quantize4_lanes(const T* __restrict__ x, int64_t count, uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const Encoder4<kType> encoder;
  const int lane = threadIdx.x % kLanes;
  for_each_tile<T, kThreads>(x, count, [&](int64_t begin, const auto& values, bool whole) {
    uint8_t* const codes = packed + begin / 2;
    float* const scales = absmax + begin / kBlock;
#pragma unroll
    for (int u = 0; u < kTileUnroll<T>; ++u) {
      const unsigned bits = group_max<kBlock / kPerLane>(largest_number_bits(values[u]));
      const unsigned word = encode<T, kType>(values[u], bits, encoder);
      if (whole) {
        __stcs(reinterpret_cast<unsigned*>(codes + u * (kPerGroup / 2)), word);
      } else {
        store_codes(packed, begin + u * kPerGroup, count, word);
      }
      if ((whole || begin + u * kPerGroup < count) && lane % (kBlock / kPerLane) == 0) {
        scales[u * (kPerGroup / kBlock)] = bnb::float_of(bits);
      }
    }
  });
}

// Blocks of kBlock = 512 ... 4096 values, each in kBlock / 8 threads.
template <class T, int kType, int kBlock>
__global__ void __launch_bounds__(kManyThreads)
    quantize4_groups(const T* __restrict__ x, int64_t count, uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const Encoder4<kType> encoder;
  for_each_block<T, kManyThreads, kBlock>(x, count, [&](int64_t first, const auto& values, unsigned bits, bool) {
    store_codes(packed, first, count, encode<T, kType>(values, bits, encoder));
    if (first < count && first % kBlock == 0) {
      absmax[first / kBlock] = bnb::float_of(bits);
    }
  });
}

// Any even block size: a thread block takes a block of values, in two passes.
template <class T, int kType>
__global__ void __launch_bounds__(kThreads) quantize4_any(const T* __restrict__ x, int64_t count, int64_t blocksize,
                                                          uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  __shared__ unsigned scratch[kLanes];
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t begin = block * blocksize, end = begin + blocksize < count ? begin + blocksize : count;
    unsigned bits = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      bits = max(bits, bnb::magnitude_bits_or_zero(to_float(x[i])));
    }
    bits = block_max(bits, scratch);
    const float inverse = 1.0f / bnb::float_of(bits);
    for (int64_t i = begin + 2 * threadIdx.x; i < end; i += 2 * blockDim.x) {
      unsigned codes[2];
      for (int k = 0; k < 2; ++k) {
        const float value = i + k < end ? to_float(x[i + k]) : 0.0f;
        codes[k] = Encoder4<kType>::any(i + k < end ? value * inverse : 0.0f);
      }
      packed[i / 2] = bnb::pack_nibbles(codes[0], codes[1]);
    }
    if (threadIdx.x == 0) {
      absmax[block] = bnb::float_of(bits);
    }
    __syncthreads();
  }
}

template <class T, int kType, int kBlock>
void launch_lanes(const Launch& launch, const T* x, int64_t count, uint8_t* packed, float* absmax) {
  const auto kernel = quantize4_lanes<T, kType, kBlock>;
  static ResidentGrid grid;
  kernel<<<grid(launch, reinterpret_cast<const void*>(kernel), kThreads, ceil_div(count, kTile<T, kThreads>)), kThreads,
           0, launch.stream()>>>(x, count, packed, absmax);
}

template <class T, int kType, int kBlock>
void launch_groups(const Launch& launch, const T* x, int64_t count, uint8_t* packed, float* absmax) {
  const auto kernel = quantize4_groups<T, kType, kBlock>;
  static ResidentGrid grid;
  kernel<<<grid(launch, reinterpret_cast<const void*>(kernel), kManyThreads, ceil_div(count, kManyThreads * kPerLane)),
           kManyThreads, 0, launch.stream()>>>(x, count, packed, absmax);
}

template <class T, int kType>
void launch_any(const Launch& launch, const T* x, int64_t count, int64_t blocksize, uint8_t* packed, float* absmax) {
  switch (blocksize) {
    case 32:
      return launch_lanes<T, kType, 32>(launch, x, count, packed, absmax);
    case 64:
      return launch_lanes<T, kType, 64>(launch, x, count, packed, absmax);
    case 128:
      return launch_lanes<T, kType, 128>(launch, x, count, packed, absmax);
    case 256:
      return launch_lanes<T, kType, 256>(launch, x, count, packed, absmax);
    case 512:
      return launch_groups<T, kType, 512>(launch, x, count, packed, absmax);
    case 1024:
      return launch_groups<T, kType, 1024>(launch, x, count, packed, absmax);
    case 2048:
      return launch_groups<T, kType, 2048>(launch, x, count, packed, absmax);
    case 4096:
      return launch_groups<T, kType, 4096>(launch, x, count, packed, absmax);
    default:
      quantize4_any<T, kType><<<launch.grid(ceil_div(count, blocksize), 8), kThreads, 0, launch.stream()>>>(
          x, count, blocksize, packed, absmax);
  }
}

}  // namespace

void quantize_4bit(const Launch& launch, const void* x, int dtype, int64_t count, int64_t blocksize, int quant_type,
                   uint8_t* packed, float* absmax) {
  if (count == 0) {
    return;
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_quant_type(quant_type, [&](auto quant) {
      launch_any<T, decltype(quant)::value>(launch, static_cast<const T*>(x), count, blocksize, packed, absmax);
    });
  });
  check_launch("quantize_4bit");
}

}  // namespace bnb_gpu
