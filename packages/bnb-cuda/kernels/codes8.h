// 8-bit codes on the device: the search in a sorted codebook, and the table for the way back.
#pragma once

#include <bnb/quant.h>

#include "block.h"
#include "codes4.h"

namespace bnb_gpu {

// All threads of the block call this; the caller synchronises afterwards. Codes beyond the end of the
// codebook read its last value.
__device__ __forceinline__ void load_table(float* shared, const float* code, int code_size) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    shared[i] = code[i < code_size ? i : code_size - 1];
  }
}

// Finds the nearest codebook value; a tie goes to the even code, NaN to code 0.
//
// Sign, exponent and the upper mantissa bits of a value name a cell, and its other mantissa bits a place in
// it, counted upwards. The entry of a cell has the code at its lower end in the upper byte, and below that
// what a place must reach for the next code, as the distance to a carry: adding the place gives the code.
// The cells are narrow enough for the dynamic maps; a codebook with several boundaries in a cell is searched
// by bisection.
class Encoder8 {
 public:
  // Magnitudes below 2^-kOctaves share a cell, as do those from 1. A codebook without negative values has
  // twice the cells per octave.
  static constexpr int kOctaves = 24;
  static constexpr int kSignedBits = 6;
  static constexpr int kCells = 2 * ((kOctaves << kSignedBits) + 1);

  struct Storage {
    float boundaries[256];
    unsigned entries[kCells];
    int crowded;
  };

  // Of no use until it is assigned to.
  __device__ Encoder8() : storage_(nullptr), entries_(0), signed_(false), crowded_(false) {}

  // All threads of the block call this.
  __device__ Encoder8(Storage& storage, const float* code, int code_size)
      : storage_(&storage), entries_(shared_address(storage.entries)), signed_(code[0] < 0.0f), crowded_(false) {
    if (threadIdx.x == 0) {
      storage.crowded = 0;
    }
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
      float boundary = bnb::float_of(0x7f800000u);
      if (i + 1 < code_size) {
        boundary = bnb::midpoint_8bit(code[i], code[i + 1]);
        // Of two equal values the lower code serves.
        if (i % 2 == 1 && code[i] != code[i + 1]) {
          boundary = float_below(boundary);
        }
      }
      storage.boundaries[i] = boundary;
    }
    __syncthreads();
    if (!(signed_ ? fill<true>(storage) : fill<false>(storage))) {
      storage.crowded = 1;
    }
    __syncthreads();
    crowded_ = storage.crowded != 0;
  }

  // Codes of values of a block with this absmax. `may_be_nan`: of one of them.
  template <int kCount>
  __device__ __forceinline__ Words<uint8_t, kCount> operator()(const float (&values)[kCount], float absmax,
                                                               bool may_be_nan) const {
    if (has_normal_reciprocal(bnb::bits_of(absmax)) && !may_be_nan && !crowded_) {
      const float inverse = refined_reciprocal(absmax);
      return signed_ ? look_up<true>(values, inverse) : look_up<false>(values, inverse);
    }
    if (absmax == 0.0f) {
      return {};
    }
    const float inverse = 1.0f / absmax;
    return search(*storage_, each<kCount>([&](int i) { return values[i] * inverse; }));
  }

  // The same for a scaled value, whatever it is.
  __device__ __forceinline__ unsigned any(float scaled) const { return code_of(*storage_, scaled); }

 private:
  template <bool kSigned>
  struct Cells {
    static constexpr int kBits = kSigned ? kSignedBits : kSignedBits + 1;
    static constexpr int kShift = 23 - kBits;
    static constexpr int kFirst = (127 - kOctaves) << kBits;
    static constexpr int kSide = (kOctaves << kBits) + 1;
    static constexpr unsigned kPlaces = (1u << kShift) - 1;
    static_assert((kSigned ? 2 : 1) * kSide <= kCells, "the storage holds all cells");
  };
  static constexpr unsigned kSmallest = (127u - kOctaves) << 23;

  // Rarely needed: a call keeps it out of the way.
  template <int kCount>
  __device__ __noinline__ static Words<uint8_t, kCount> search(const Storage& storage, Lanes<kCount> scaled) {
    Words<uint8_t, kCount> codes = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      codes.words[i / 4] |= code_of(storage, scaled.values[i]) << (8 * (i % 4));
    }
    return codes;
  }

  template <bool kSigned, int kCount>
  __device__ __forceinline__ Words<uint8_t, kCount> look_up(const float (&values)[kCount], float inverse) const {
    using Layout = Cells<kSigned>;
    static_assert(kCount % 4 == 0, "codes fill words");
    unsigned sums[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float scaled = values[i] * inverse;
      const unsigned bits = bnb::bits_of(fmaxf(kSigned ? fabsf(scaled) : scaled, bnb::float_of(kSmallest)));
      // All bits of a negative value.
      const int negative = kSigned ? static_cast<int>(bnb::bits_of(scaled)) >> 31 : 0;
      const unsigned cell = multiply_add(static_cast<unsigned>(negative), 0u - Layout::kSide, bits >> Layout::kShift);
      sums[i] = entry(cell, Layout::kFirst) + ((bits ^ static_cast<unsigned>(negative)) & Layout::kPlaces);
    }
    Words<uint8_t, kCount> codes;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const unsigned low = __byte_perm(sums[i], sums[i + 1], 0x0073),
                     high = __byte_perm(sums[i + 2], sums[i + 3], 0x0073);
      codes.words[i / 4] = __byte_perm(low, high, 0x5410);
    }
    return codes;
  }

  // Written out, for the units of multiplication are less in demand here than those of shifts and bits.
  __device__ __forceinline__ static unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
#ifdef BNB_HIP
    return a * b + c;
#else
    unsigned result;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
#endif
  }

  // The entry of a cell counted from `first`.
  __device__ __forceinline__ unsigned entry(unsigned cell, int first) const {
#ifdef BNB_HIP
    return storage_->entries[cell - first];
#else
    const unsigned address = multiply_add(cell, 4u, entries_ - 4u * first);
    unsigned result;
    asm("ld.shared.u32 %0, [%1];" : "=r"(result) : "r"(address));
    return result;
#endif
  }

  // Writes this thread's entries; whether one boundary at most lies in each of these cells.
  template <bool kSigned>
  __device__ bool fill(Storage& storage) const {
    using Layout = Cells<kSigned>;
    bool fits =
        boundaries_below(kSigned ? -bnb::float_of(kSmallest) : 0.0f) == boundaries_below(bnb::float_of(kSmallest));
    fits = fits && boundaries_below(1.0f) == boundaries_below(bnb::float_of(0x7f800000u));
    fits = fits && (kSigned ? boundaries_below(-1.0f) == 0 : boundaries_below(0.0f) == 0);
    // A thread fills neighbouring cells: one search, then a walk along the boundaries.
    constexpr int kTotal = (kSigned ? 2 : 1) * Layout::kSide;
    const int share = (kTotal + blockDim.x - 1) / blockDim.x, first = threadIdx.x * share;
    int rank = 0;
    for (int i = first; i < min(first + share, kTotal); ++i) {
      const bool negative = i >= Layout::kSide;
      const int cell = negative ? i - Layout::kSide : i;
      const unsigned nearest = static_cast<unsigned>(cell + Layout::kFirst) << Layout::kShift;
      const unsigned farthest = cell + 1 == Layout::kSide ? nearest : nearest | Layout::kPlaces;
      const float near = bnb::float_of(nearest), far = bnb::float_of(farthest);
      // Boundaries below the end of the cell next to zero, then below the other one.
      const float begin = negative ? -near : near, end = negative ? -far : far;
      rank = i == first || cell == 0 ? boundaries_below(begin) : walk(rank, begin);
      const int before = rank;
      rank = walk(rank, end);
      const int base = min(before, rank), crossings = max(before, rank) - base;
      fits = fits && crossings <= 1;
      unsigned distance = 0;
      if (crossings > 0) {
        // The first place whose value is above the boundary.
        const unsigned place = bnb::bits_of(storage.boundaries[base]) & Layout::kPlaces;
        distance = (1u << 24) - (negative ? Layout::kPlaces - place : place) - 1;
      }
      storage.entries[i] = (static_cast<unsigned>(base) << 24) + distance;
    }
    return fits;
  }

  __device__ static float float_below(float value) {
    const unsigned bits = bnb::bits_of(value);
    if (value > 0.0f) {
      return bnb::float_of(bits - 1);
    }
    return bnb::float_of(value == 0.0f ? 0x80000001u : bits + 1);
  }
  __device__ static int boundaries_below(const Storage& storage, float value) {
    int rank = 0;
    for (int step = 128; step > 0; step >>= 1) {
      rank += storage.boundaries[rank + step - 1] < value ? step : 0;
    }
    return rank;
  }
  __device__ int boundaries_below(float value) const { return boundaries_below(*storage_, value); }
  __device__ static unsigned code_of(const Storage& storage, float scaled) {
    return scaled == scaled ? static_cast<unsigned>(boundaries_below(storage, scaled)) : 0u;
  }

  // The same from the number for a value near by.
  __device__ int walk(int rank, float value) const {
    while (rank < 255 && storage_->boundaries[rank] < value) {
      ++rank;
    }
    while (rank > 0 && !(storage_->boundaries[rank - 1] < value)) {
      --rank;
    }
    return rank;
  }

  const Storage* storage_;
  unsigned entries_;  // their address in shared memory
  bool signed_, crowded_;
};

}  // namespace bnb_gpu
