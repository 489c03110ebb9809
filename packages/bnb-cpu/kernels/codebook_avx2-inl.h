// An 8-bit codebook, searched in a table that stays in the first-level cache. For AVX2.
#pragma once

#include "grid8-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

class Codebook {
 public:
  // Values in a block, at most.
  static constexpr int kBlock = 256;
  static constexpr bool kDecodesVectors = true;

  void prepare(const float* qmap) {
    memcpy(values_, qmap, sizeof values_);
    prepare_codes(qmap, 256);
  }

  // For `quantize` alone; `code_size` is at most 256.
  void prepare_codes(const float* code, int64_t code_size) {
    bucketed_ = fill_entries(code, code_size);
    if (!bucketed_) {
      fill_grid_codes(code, code_size, grid_codes_);
      grid_codes_[kNanPosition] = 0;
    }
  }

  // Any number of values, and NaN among them gets code 0. `finite`: that all are finite. Asks for as many values that
  // follow: the block that is likely to be next, for memory would wait while this one is encoded.
  template <class T>
  void quantize(const T* x, float scale, bool finite, int64_t count, uint8_t* codes) const {
    encode_all<true>(x, scale, finite, count, codes);
  }

  // `values` has room for a whole block.
  void decode(const uint8_t* codes, float absmax, int count, float* values) const {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(values + i, decode_some(codes + i, splat(absmax)));
    }
    for (; i < count; ++i) {
      values[i] = decode_some(codes + i, absmax);
    }
  }

  // The values of as many codes as `absmax` has lanes.
  F32 decode_some(const uint8_t* codes, F32 absmax) const { return lookup(Table256(values_), codes) * absmax; }
  float decode_some(const uint8_t* codes, float absmax) const { return values_[*codes] * absmax; }

  // absmax: that of the values, which are all finite. Values after the last one may be overwritten.
  void encode(float* values, float absmax, int count, uint8_t* codes) const {
    if (absmax == 0.0f) {
      memset(codes, 0, static_cast<size_t>(count));
    } else {
      encode_all<false>(values, 1.0f / absmax, true, count, codes);
    }
  }

 private:
  // Values that are encoded together.
  static constexpr int kPart = 32;

  // Positions are counted from the middle of the grid, which no position is on: the points next to it are half a
  // step away. A bucket holds the positions whose distances from the middle have the same sign, the same exponent
  // (16 are possible) and the same first kBits bits of the mantissa, so that buckets are finer where codebooks are.
  // An entry is the distance at which the code changes inside of the bucket, if it does: a whole number below 2^15,
  // which leaves the last eight bits of the mantissa zero, and these hold the code below that distance. Distances of
  // positions are far enough from whole numbers for those bits not to matter in a comparison.
  static constexpr int kBits = 7;
  static constexpr int kSide = 16 << kBits;  // buckets on either side of the middle
  static constexpr float kMiddle = bnb::kGridScale;
  static constexpr uint32_t kFirstBucket = 126 << kBits;  // of 0.5
  static constexpr uint32_t kNoChange = 0x7f000000u;      // no distance is above it

  // The leading bits of these numbers are those of the distance. On the lower side they continue those of the upper
  // side: the factor takes the exponents above it.
  BNB_FN F32 bucket_bits(F32 distance) { return max(distance, distance * splat(-65536.0f)); }
  BNB_FN int bucket_of(int position) {
    const float distance = static_cast<float>(position) - kMiddle;
    const uint32_t bits = bnb::bits_of(distance > 0.0f ? distance : distance * -65536.0f);
    return static_cast<int>((bits >> (23 - kBits)) - kFirstBucket);
  }

  // Buckets in the order of their positions, and back.
  BNB_FN int ordinal_of(int position) {
    const int bucket = bucket_of(position);
    return bucket < kSide ? kSide + bucket : 2 * kSide - 1 - bucket;
  }
  uint32_t& entry_at(int ordinal) { return entries_[ordinal < kSide ? 2 * kSide - 1 - ordinal : ordinal - kSide]; }

  // Whether no bucket has two changes of the code, or one by more than 1.
  bool fill_entries(const float* code, int64_t code_size) {
    int position = 0, next = 0;
    const auto fill = [&](int stop, int64_t i) {
      for (; next < stop; ++next) {
        entry_at(next) = kNoChange | static_cast<uint32_t>(i);
      }
    };
    for (int64_t i = 0; i + 1 < code_size; ++i) {
      position = first_position_above(bnb::midpoint_8bit(code[i], code[i + 1]), position);
      if (position == 0) {
        continue;
      }
      if (position == bnb::kGridPoints) {
        fill(2 * kSide, i);
        return true;
      }
      const int below = ordinal_of(position - 1);
      if (below != ordinal_of(position)) {
        fill(below + 1, i);
      } else if (below < next) {
        return false;
      } else {
        fill(below, i);
        entry_at(next++) = bnb::bits_of(static_cast<float>(position) - kMiddle - 0.5f) | static_cast<uint32_t>(i);
      }
    }
    fill(2 * kSide, code_size - 1);
    return true;
  }

  template <bool kPrefetch, class T>
  void encode_all(const T* x, float scale, bool finite, int64_t count, uint8_t* codes) const {
    if (!bucketed_) {
      return encode_block_8bit(x, count, scale, grid_codes_, codes);
    }
    // A subnormal absmax may have no reciprocal, and then zeros scale to NaN.
    finite = finite && bnb::magnitude_bits(scale) < 0x7f800000u;
    int64_t i = 0;
    while (i + kPart <= count) {
      const int64_t left = (count - i) / kPart * kPart;
      const int size = static_cast<int>(left < kBlock ? left : kBlock);
      if (kPrefetch) {
        for (int ahead = 0; ahead < size; ahead += 64 / static_cast<int>(sizeof(T))) {
          prefetch(x + i + ahead, count * static_cast<int64_t>(sizeof(T)));
        }
      }
      encode_parts(x + i, scale, finite, size, codes + i);
      i += size;
    }
    if (i < count) {
      T values[kPart] = {};
      uint8_t padded[kPart];
      memcpy(values, x + i, static_cast<size_t>(count - i) * sizeof(T));
      encode_parts(values, scale, finite, kPart, padded);
      memcpy(codes + i, padded, static_cast<size_t>(count - i));
    }
  }

  template <class T>
  void encode_parts(const T* x, float scale, bool finite, int count, uint8_t* codes) const {
    if (finite) {
      encode_parts<true>(x, scale, count, codes);
    } else {
      encode_parts<false>(x, scale, count, codes);
    }
  }

  // As bnb::grid_position, from the middle; `scaled` is not NaN. What was finite before it was scaled comes so close to
  // [-1, 1] that it is on the grid without clamping, and for all values of the sum the fused operation gives the same
  // integer as two roundings.
  BNB_FN F32 distance_of(F32 scaled) {
    const F32 position = fma(scaled + splat(1.0f), splat(bnb::kGridScale), splat(0.5f));
    return F32{_mm256_round_ps(position.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)} - splat(kMiddle);
  }

  // Up to kBlock values, a multiple of kPart; kFinite: that are finite when scaled. Buckets go through memory, whose
  // loads run beside the arithmetic; moves from vectors to general registers would not.
  template <bool kFinite, class T>
  void encode_parts(const T* x, float scale, int count, uint8_t* codes) const {
    alignas(32) float distances[kBlock], numbers[kFinite ? 1 : kBlock];
    alignas(32) int32_t buckets[kBlock];
    for (int i = 0; i < count; i += kLanes) {
      F32 scaled = load(x + i) * splat(scale);
      if (!kFinite) {
        store(numbers + i, scaled);
        // The second operand in place of NaN.
        scaled = min(max(scaled, splat(-1.0f)), splat(1.0f));
      }
      const F32 distance = distance_of(scaled);
      store(distances + i, distance);
      store(buckets + i, shift_right<23 - kBits>(bits_of(bucket_bits(distance))));
    }
    for (int i = 0; i < count; i += kPart) {
      __m256i found[4];
      for (int j = 0; j < 4; ++j) {
        const int at = i + kLanes * j;
        const F32 entry = entries_of(buckets + at);
        // A comparison that holds is the number -1.
        const __m256i above = _mm256_castps_si256((entry < load(distances + at)).v);
        found[j] = _mm256_and_si256(_mm256_sub_epi32(bits_of(entry).v, above), _mm256_set1_epi32(0xff));
        if (!kFinite) {
          const __m256 number = load(numbers + at).v;
          found[j] = _mm256_and_si256(found[j], _mm256_castps_si256(_mm256_cmp_ps(number, number, _CMP_ORD_Q)));
        }
      }
      // Packing works inside of 128-bit lanes; the order of dwords makes up for it.
      const __m256i bytes =
          _mm256_packus_epi16(_mm256_packus_epi32(found[0], found[1]), _mm256_packus_epi32(found[2], found[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                          _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    }
  }

  F32 entries_of(const int32_t* buckets) const {
    const auto entry = [&](int i) {
      return static_cast<int32_t>(entries_[static_cast<int64_t>(static_cast<uint32_t>(buckets[i])) - kFirstBucket]);
    };
    return float_of(
        {_mm256_setr_epi32(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7))});
  }

  alignas(64) float values_[256];
  alignas(64) uint32_t entries_[2 * kSide];
  bool bucketed_;
  uint8_t grid_codes_[bnb::kGridPoints + 1];
};

}  // namespace BNB_ISA
}  // namespace bnb_cpu
