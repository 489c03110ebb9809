// Packed 4-bit codes to values: whole tensors, and rows of a table.
//
// A lane holds the 16-entry codebook value of its number; a shuffle by code is the look-up. It decodes
// four bytes at a time into one 16-byte store of 16-bit values, with several loads in flight.
#include <type_traits>

#include "codes4.h"
#include "kernels.h"

namespace bnb_gpu {
namespace {

constexpr int kThreads = 256;
// Values of a lane in a row of a table.
constexpr int kPerLane = 8;
// Values of a lane in a tensor: one store of 16 bytes, so that the stores of a group leave no gaps.
template <class T>
constexpr int kOwn = 16 / sizeof(T);
// Values of a lane that are on their way at once.
constexpr int kInTurn = 32;
// From this block size on, each block that a group of lanes decodes in turn has a lane of its own.
constexpr int kLeastSharedShift = 5;
static_assert(kInTurn <= 1 << kLeastSharedShift, "a group of lanes decodes more blocks than it has lanes");

// The values of as many halves of bytes. All lanes of a group must call this together.
template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> decode(unsigned word, float table, float scale) {
  Vector<T, kCount> values;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const unsigned code = word >> (i % 2 == 0 ? 4 * i + 4 : 4 * i - 4) & 0xfu;
    values.values[i] = from_float<T>(shuffle(table, static_cast<int>(code)) * scale);
  }
  return values;
}

template <class T>
__device__ __forceinline__ void store_values(T* out, int64_t begin, int64_t count, const Vector<T, kOwn<T>>& values) {
  if (begin + kOwn<T> <= count) {
    store_streaming<T, kOwn<T>>(out + begin, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kOwn<T>; ++i) {
    if (begin + i < count) {
      out[begin + i] = values.values[i];
    }
  }
}

template <int kCount>
__device__ __forceinline__ unsigned load_codes(const uint8_t* packed, int64_t begin, int64_t count) {
  if (begin + kCount <= count) {
    if constexpr (kCount == 8) {
      return __ldcs(reinterpret_cast<const unsigned*>(packed + begin / 2));
    } else {
      return __ldcs(reinterpret_cast<const unsigned short*>(packed + begin / 2));
    }
  }
  unsigned word = 0;
  for (int i = 0; begin + 2 * i < count; ++i) {
    word |= static_cast<unsigned>(packed[begin / 2 + i]) << (8 * i);
  }
  return word;
}

// Block sizes that are powers of two from 8.
template <class T, int kType, bool kNested>
__global__ void __launch_bounds__(kThreads)
    dequantize4(const uint8_t* __restrict__ packed, const Statistics statistics, int64_t count, int block_shift,
                int nested_shift, T* __restrict__ out) {
  __shared__ float code[256];
  const BlockScale<kNested> scale_of(statistics, code, nested_shift);
  if (kNested) {
    __syncthreads();
  }
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const float table = Tables4<kType>::value(lane % 16);
  constexpr int kTile = kThreads * kInTurn, kPerGroup = kOwn<T> * kLanes, kUnroll = kInTurn / kOwn<T>;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile; tile < count;
       tile += static_cast<int64_t>(gridDim.x) * kTile) {
    const int64_t begin = tile + group * (kLanes * kInTurn) + lane * kOwn<T>;
    unsigned words[kUnroll];
    float scales[kUnroll];
    if (kNested && kUnroll > 4 && block_shift >= kLeastSharedShift) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        words[u] = load_codes<kOwn<T>>(packed, begin + u * kPerGroup, count);
      }
      // Nested statistics take several steps: each lane works out those of one block, and the others ask it. With
      // 16-bit values, which want half as many, waiting for an answer costs more than it saves (52 us, 48 without).
      const int64_t own = (begin - lane * kOwn<T> >> block_shift) + lane, blocks = (count - 1 >> block_shift) + 1;
      const float scale = scale_of(own < blocks ? own : blocks - 1);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        scales[u] = shuffle(scale, u * kPerGroup + lane * kOwn<T> >> block_shift);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t first = begin + u * kPerGroup;
        words[u] = load_codes<kOwn<T>>(packed, first, count);
        scales[u] = first < count ? scale_of(first >> block_shift) : 0.0f;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      store_values(out, begin + u * kPerGroup, count, decode<T, kOwn<T>>(words[u], table, scales[u]));
    }
  }
}

// Any block size: a thread decodes a byte at a time.
template <class T, int kType, bool kNested>
__global__ void __launch_bounds__(kThreads)
    dequantize4_any(const uint8_t* __restrict__ packed, const Statistics statistics, int64_t count, int64_t blocksize,
                    int nested_shift, T* __restrict__ out) {
  __shared__ float code[256];
  __shared__ float table[16];
  const BlockScale<kNested> scale_of(statistics, code, nested_shift);
  if (threadIdx.x < 16) {
    table[threadIdx.x] = Tables4<kType>::value(threadIdx.x);
  }
  __syncthreads();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    out[i] = from_float<T>(table[bnb::nibble_at(packed, i)] * scale_of(i / blocksize));
  }
}

// One row of the table per look-up. Rows of a multiple of 8 values begin at whole words.
template <class T, int kType, bool kNested, class Index>
__global__ void __launch_bounds__(kThreads)
    embedding4(const Index* __restrict__ indices, int64_t lookups, const uint8_t* __restrict__ packed,
               const Statistics statistics, int64_t rows, int64_t width, int block_shift, int nested_shift,
               T* __restrict__ out) {
  __shared__ float code[256];
  const BlockScale<kNested> scale_of(statistics, code, nested_shift);
  if (kNested) {
    __syncthreads();
  }
  const int lane = threadIdx.x % kLanes;
  const float table = Tables4<kType>::value(lane % 16);
  const int64_t per_row = width / kPerLane, total = lookups * per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  // Rounded up, so that the lanes of a group leave the loop together.
  const int64_t rounded = (total + kLanes - 1) / kLanes * kLanes;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; unit < rounded; unit += step) {
    const bool active = unit < total;
    const int64_t lookup = active ? unit / per_row : 0;
    const int64_t column = active ? (unit - lookup * per_row) * kPerLane : 0;
    const int64_t row = static_cast<int64_t>(indices[lookup]);
    const bool valid = row >= 0 && row < rows;
    const int64_t first = (valid ? row : 0) * width + column;
    const unsigned word = __ldg(reinterpret_cast<const unsigned*>(packed + first / 2));
    // A look-up outside of the table gives NaN: there is nobody on the device to raise an error.
    const float scale = valid ? scale_of(first >> block_shift) : bnb::float_of(0x7fc00000u);
    const Vector<T, kPerLane> values = decode<T, kPerLane>(word, table, scale);
    if (active) {
      *reinterpret_cast<Vector<T, kPerLane>*>(out + lookup * width + column) = values;
    }
  }
}

template <class T, int kType, bool kNested, class Index>
__global__ void __launch_bounds__(kThreads)
    embedding4_any(const Index* __restrict__ indices, int64_t lookups, const uint8_t* __restrict__ packed,
                   const Statistics statistics, int64_t rows, int64_t width, int64_t blocksize, int nested_shift,
                   T* __restrict__ out) {
  __shared__ float code[256];
  __shared__ float table[16];
  const BlockScale<kNested> scale_of(statistics, code, nested_shift);
  if (threadIdx.x < 16) {
    table[threadIdx.x] = Tables4<kType>::value(threadIdx.x);
  }
  __syncthreads();
  const int64_t total = lookups * width;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t lookup = i / width, row = static_cast<int64_t>(indices[lookup]);
    const bool valid = row >= 0 && row < rows;
    const int64_t element = (valid ? row : 0) * width + (i - lookup * width);
    const float scale = valid ? scale_of(element / blocksize) : bnb::float_of(0x7fc00000u);
    out[i] = from_float<T>(table[bnb::nibble_at(packed, element)] * scale);
  }
}

template <class T, int kType, bool kNested, class Index>
void launch_embedding(const Launch& launch, const void* indices, int64_t lookups, const uint8_t* packed,
                      const Statistics& statistics, int64_t rows, int64_t width, int64_t blocksize, T* out) {
  const Index* from = static_cast<const Index*>(indices);
  const int shift = exact_log2(blocksize), nested_shift = exact_log2(statistics.nested_blocksize);
  if (width % kPerLane == 0 && shift >= 3) {
    const unsigned grid = launch.grid(ceil_div(lookups * (width / kPerLane), kThreads), 16);
    embedding4<T, kType, kNested, Index><<<grid, kThreads, 0, launch.stream()>>>(from, lookups, packed, statistics,
                                                                                 rows, width, shift, nested_shift, out);
  } else {
    const unsigned grid = launch.grid(ceil_div(lookups * width, kThreads), 16);
    embedding4_any<T, kType, kNested, Index><<<grid, kThreads, 0, launch.stream()>>>(
        from, lookups, packed, statistics, rows, width, blocksize, nested_shift, out);
  }
}

}  // namespace

void dequantize_4bit(const Launch& launch, const uint8_t* packed, const Statistics& statistics, int64_t count,
                     int64_t blocksize, int quant_type, void* out, int dtype) {
  if (count == 0) {
    return;
  }
  const int shift = exact_log2(blocksize), nested_shift = exact_log2(statistics.nested_blocksize);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_quant_type(quant_type, [&](auto quant) {
      with_nested(statistics, [&](auto nested) {
        constexpr int kType = decltype(quant)::value;
        constexpr bool kNested = decltype(nested)::value;
        if (shift >= 3) {
          const unsigned grid = launch.grid(ceil_div(count, kThreads * kInTurn), 32);
          dequantize4<T, kType, kNested><<<grid, kThreads, 0, launch.stream()>>>(packed, statistics, count, shift,
                                                                                 nested_shift, static_cast<T*>(out));
        } else {
          const unsigned grid = launch.grid(ceil_div(count, kThreads), 16);
          dequantize4_any<T, kType, kNested><<<grid, kThreads, 0, launch.stream()>>>(
              packed, statistics, count, blocksize, nested_shift, static_cast<T*>(out));
        }
      });
    });
  });
  check_launch("dequantize_4bit");
}

void embedding_4bit(const Launch& launch, const void* indices, bool indices_64bit, int64_t lookups,
                    const uint8_t* packed, const Statistics& statistics, int64_t rows, int64_t width, int64_t blocksize,
                    int quant_type, void* out, int dtype) {
  if (lookups * width == 0) {
    return;
  }
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_quant_type(quant_type, [&](auto quant) {
      with_nested(statistics, [&](auto nested) {
        constexpr int kType = decltype(quant)::value;
        constexpr bool kNested = decltype(nested)::value;
        const auto launch_with =
            indices_64bit ? launch_embedding<T, kType, kNested, int64_t> : launch_embedding<T, kType, kNested, int32_t>;
        launch_with(launch, indices, lookups, packed, statistics, rows, width, blocksize, static_cast<T*>(out));
      });
    });
  });
  check_launch("embedding_4bit");
}

}  // namespace bnb_gpu
