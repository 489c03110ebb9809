// What the fused 4-bit products share: decoding into operands of the matrix units, and these units.
//
// Weights are the left operand (16 rows x 16 columns), activations the right one (16 x 8 rows of a), so
// that one instruction multiplies 256 weights whether there is one row of activations or eight. The
// order of k inside a product is free as long as both operands agree: a lane takes neighbouring bytes of
// a weight row as they lie in memory, each byte being one register of the operand, and neighbouring
// activations. Codes go in as 16-bit numbers; the float32 absmax of a block is applied to the sum over
// that block.
#pragma once

#include "codes4.h"
#include "kernels.h"

namespace bnb_gpu {

// Pairs of decoded values by byte, one copy per lane: no two lanes of a group share a bank.
constexpr int kPairTableBytes = 256 * kLanes * 4;
// The same with each byte's copies at a multiple of 256, twice as large: moving bytes is all it takes to make the place
// of an entry.
constexpr int kSpreadTablePitch = 256, kSpreadTableBytes = 256 * kSpreadTablePitch;

template <class T>
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  T pair[2] = {from_float<T>(low), from_float<T>(high)};
  unsigned bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(unsigned bits) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  } else {
    T pair[2];
    memcpy(pair, &bits, sizeof bits);
    return make_float2(to_float(pair[0]), to_float(pair[1]));
  }
}

// All threads of the block call this; the caller synchronises afterwards.
template <class T, int kType, int kPitch = kLanes * 4>
__device__ __forceinline__ void build_pair_table(unsigned* table) {
  constexpr float kValues[2][16] = {{BNB_NF4_VALUES}, {BNB_FP4_VALUES}};
  const int lane = threadIdx.x % kLanes;
  // The earlier value of a pair lies in the high nibble.
  for (int high = threadIdx.x / kLanes; high < 16; high += blockDim.x / kLanes) {
    const float first = Tables4<kType>::value(high);
#pragma unroll
    for (int low = 0; low < 16; ++low) {
      table[(16 * high + low) * (kPitch / 4) + lane] = pack_pair<T>(first, kValues[kType][low]);
    }
  }
}

// Offset in bytes of a byte's entry in the table, for the copy of a lane at `lane_offset` = 4 * lane.
template <int kByte>
__device__ __forceinline__ unsigned pair_offset(unsigned word, unsigned lane_offset) {
  constexpr unsigned kMask = 0xffu << 7;
  const unsigned moved = kByte == 0 ? word << 7 : word >> (kByte == 0 ? 0 : 8 * kByte - 7);
  return (moved & kMask) | lane_offset;
}

template <int kByte>
__device__ __forceinline__ unsigned decode_pair(const unsigned char* table, unsigned lane_offset, unsigned word) {
  return *reinterpret_cast<const unsigned*>(table + pair_offset<kByte>(word, lane_offset));
}

// The pair of one of the four bytes of a word in a spread table; `selector` is that of this byte.
__device__ __forceinline__ unsigned spread_selector(int byte) { return 0x5504u | byte << 4; }
template <class Pair = unsigned>
__device__ __forceinline__ Pair decode_spread(const unsigned char* table, unsigned lane_offset, unsigned word,
                                              unsigned selector) {
  return *reinterpret_cast<const Pair*>(table + __byte_perm(word, lane_offset, selector));
}

// d += a @ b for one 16 x 8 x 16 tile.
template <class T>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if BNB_DEVICE_ARCH >= 800
  if constexpr (std::is_same_v<T, half_t>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// A lane's share of kChunk columns of a weight row: kChunk / 8 bytes, as words.
template <int kChunk>
struct Codes {
  static constexpr int kWords = kChunk / 32;
  unsigned words[kWords];
};

template <int kChunk>
__device__ __forceinline__ Codes<kChunk> load_codes(const uint8_t* from) {
  Codes<kChunk> codes;
  if constexpr (kChunk == 64) {
    const uint2 pair = __ldcs(reinterpret_cast<const uint2*>(from));
    codes.words[0] = pair.x;
    codes.words[1] = pair.y;
  } else {
    codes.words[0] = __ldcs(reinterpret_cast<const unsigned*>(from));
  }
  return codes;
}

// The left operand of the i-th product of a chunk, for rows g and g + 8 of a tile.
template <int kChunk>
__device__ __forceinline__ void decode_left(unsigned (&left)[4], int i, const unsigned char* table,
                                            unsigned lane_offset, const Codes<kChunk>& upper,
                                            const Codes<kChunk>& lower) {
  const unsigned u = upper.words[i / 2], l = lower.words[i / 2];
  if (i % 2 == 0) {
    left[0] = decode_pair<0>(table, lane_offset, u);
    left[1] = decode_pair<0>(table, lane_offset, l);
    left[2] = decode_pair<1>(table, lane_offset, u);
    left[3] = decode_pair<1>(table, lane_offset, l);
  } else {
    left[0] = decode_pair<2>(table, lane_offset, u);
    left[1] = decode_pair<2>(table, lane_offset, l);
    left[2] = decode_pair<3>(table, lane_offset, u);
    left[3] = decode_pair<3>(table, lane_offset, l);
  }
}

// The left operands of the kChunk / 16 products of a chunk.
template <int kChunk>
struct LeftOperands {
  static constexpr int kCount = kChunk / 16;
  unsigned registers[kCount][4];

  __device__ __forceinline__ LeftOperands(const unsigned char* table, unsigned lane_offset, const Codes<kChunk>& upper,
                                          const Codes<kChunk>& lower) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      decode_left<kChunk>(registers[i], i, table, lane_offset, upper, lower);
    }
  }
};

__device__ __forceinline__ float load_bias(const void* bias, int dtype, int64_t index) {
  if (bias == nullptr) {
    return 0.0f;
  }
  switch (static_cast<bnb::Dtype>(dtype)) {
    case bnb::Dtype::kFloat32:
      return static_cast<const float*>(bias)[index];
    case bnb::Dtype::kFloat16:
      return to_float(static_cast<const half_t*>(bias)[index]);
    default:
      return to_float(static_cast<const bfloat16_t*>(bias)[index]);
  }
}

// Calls `body` with the 16-bit element type.
template <class Body>
void with_half_dtype(int dtype, Body&& body) {
  if (dtype == static_cast<int>(bnb::Dtype::kFloat16)) {
    body(Type<half_t>{});
  } else {
    body(Type<bfloat16_t>{});
  }
}

// Whether tiles of 32 rows, which share the activations, leave no more of the device idle than tiles of 16,
// when each multiprocessor takes tiles in turn.
inline bool prefers_wide_tiles(int64_t n, int processors) {
  const auto rows_per_processor = [&](int64_t rows) { return ceil_div(ceil_div(n, rows), processors) * rows; };
  return rows_per_processor(32) <= rows_per_processor(16);
}

template <class Body>
void with_chunk(int64_t blocksize, Body&& body) {
  if (blocksize % 64 == 0) {
    body(std::integral_constant<int, 64>{});
  } else {
    body(std::integral_constant<int, 32>{});
  }
}

}  // namespace bnb_gpu
