// Vectors of 8 lanes: AVX2, FMA, F16C, BMI2. The interface is described in simd_scalar.h.
#pragma once

#include <bnb/dtypes.h>
#include <bnb/quant.h>
#include <immintrin.h>

namespace bnb_cpu {
namespace BNB_ISA {

constexpr int kLanes = 8;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};
struct Mask {
  __m256 v;
};

BNB_FN F32 splat(float a) { return {_mm256_set1_ps(a)}; }
BNB_FN I32 splat(int32_t a) { return {_mm256_set1_epi32(a)}; }

BNB_FN F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
BNB_FN F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
BNB_FN F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
BNB_FN F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
BNB_FN F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
BNB_FN F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
BNB_FN F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
BNB_FN F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }

BNB_FN I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
BNB_FN I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
BNB_FN I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
BNB_FN I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
BNB_FN I32 operator^(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
BNB_FN I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }

template <int kBits>
BNB_FN I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.v, kBits)};
}
template <int kBits>
BNB_FN I32 shift_right(I32 a) {
  return {_mm256_srli_epi32(a.v, kBits)};
}

BNB_FN I32 bits_of(F32 a) { return {_mm256_castps_si256(a.v)}; }
BNB_FN F32 float_of(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
BNB_FN I32 truncate(F32 a) { return {_mm256_cvttps_epi32(a.v)}; }
BNB_FN I32 round_to_int(F32 a) {
  return {_mm256_cvttps_epi32(_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
BNB_FN F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }

BNB_FN Mask operator<=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
BNB_FN Mask operator<(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
BNB_FN Mask operator>(I32 a, I32 b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))}; }
BNB_FN bool any(Mask a) { return _mm256_movemask_ps(a.v) != 0; }
BNB_FN F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
BNB_FN I32 select(Mask m, I32 a, I32 b) { return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))}; }

BNB_FN int32_t reduce_max(I32 a) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(half);
}
BNB_FN float reduce_add(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// --- loads and stores --------------------------------------------------------------------------------

BNB_FN F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
BNB_FN F32 load(const bnb::Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
BNB_FN F32 load(const bnb::BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

// Eight dwords that fit 16 bits.
BNB_FN __m128i narrow_words(__m256i a) {
  return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
BNB_FN __m128i narrow(bnb::Half*, F32 a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BNB_FN __m128i narrow(bnb::BFloat16*, F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return narrow_words(_mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan));
}

BNB_FN void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
template <class T>
BNB_FN void store(T* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, a));
}

BNB_FN I32 load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
BNB_FN void store(int32_t* p, I32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }

BNB_FN void stream(float* p, F32 a) { _mm256_stream_ps(p, a.v); }
template <class T>
BNB_FN void stream(T* p, F32 a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, a));
}
BNB_FN void stream_fence() { _mm_sfence(); }

BNB_FN I32 load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
BNB_FN void store_bytes(uint8_t* p, I32 a) {
  const __m128i words = narrow_words(_mm256_and_si256(a.v, _mm256_set1_epi32(0xff)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

BNB_FN I32 load_nibbles(const uint8_t* packed, int64_t index) {
  int32_t bytes;
  memcpy(&bytes, packed + (index >> 1), sizeof bytes);
  return {_mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4))};
}
// A pair of lanes is one qword; the low bytes of the four become the packed bytes.
BNB_FN void store_nibbles(uint8_t* packed, int64_t index, I32 a) {
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(a.v, 4), _mm256_srli_epi64(a.v, 32));
  const __m256i low =
      _mm256_shuffle_epi8(pairs, _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                  -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const int32_t bytes = _mm_cvtsi128_si32(_mm_or_si128(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
  memcpy(packed + (index >> 1), &bytes, sizeof bytes);
}

// --- lookups -----------------------------------------------------------------------------------------

struct Table16 {
  __m256 low, high;

  explicit Table16(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  explicit Table16(const int32_t* p)
      : low(_mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))),
        high(_mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8)))) {}
};
BNB_FN F32 lookup(const Table16& table, I32 index) {
  // The permutes see three bits; the fourth, moved to the sign, chooses.
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index.v), _mm256_permutevar8x32_ps(table.high, index.v),
                           _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
}

struct Table256 {
  const float* entries;

  explicit Table256(const float* p) : entries(p) {}
};
BNB_FN F32 lookup(const Table256& table, I32 index) { return {_mm256_i32gather_ps(table.entries, index.v, 4)}; }
// Eight loads, which take half the time of a gather on AMD's Zen 3.
BNB_FN F32 lookup(const Table256& table, const uint8_t* bytes) {
  const float* p = table.entries;
  return {_mm256_setr_ps(p[bytes[0]], p[bytes[1]], p[bytes[2]], p[bytes[3]], p[bytes[4]], p[bytes[5]], p[bytes[6]],
                         p[bytes[7]])};
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
