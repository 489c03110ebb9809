// Vectors of 16 lanes: AVX-512 F, BW, DQ, VL. The interface is described in simd_scalar.h.
#pragma once

#include <bnb/dtypes.h>
#include <bnb/quant.h>
#include <immintrin.h>

namespace bnb_cpu {
namespace BNB_ISA {

constexpr int kLanes = 16;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

BNB_FN F32 splat(float a) { return {_mm512_set1_ps(a)}; }
BNB_FN I32 splat(int32_t a) { return {_mm512_set1_epi32(a)}; }

BNB_FN F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
BNB_FN F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BNB_FN F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BNB_FN F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
BNB_FN F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
BNB_FN F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BNB_FN F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
BNB_FN F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }

BNB_FN I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
BNB_FN I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
BNB_FN I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
BNB_FN I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
BNB_FN I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
BNB_FN I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }

template <int kBits>
BNB_FN I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
BNB_FN I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}

BNB_FN I32 bits_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
BNB_FN F32 float_of(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
BNB_FN I32 truncate(F32 a) { return {_mm512_cvttps_epi32(a.v)}; }
BNB_FN I32 round_to_int(F32 a) {
  return {_mm512_cvt_roundps_epi32(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
BNB_FN F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }

BNB_FN Mask operator<=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
BNB_FN Mask operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
BNB_FN Mask operator>(I32 a, I32 b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
BNB_FN bool any(Mask a) { return a.v != 0; }
BNB_FN F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
BNB_FN I32 select(Mask m, I32 a, I32 b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

BNB_FN int32_t reduce_max(I32 a) { return _mm512_reduce_max_epi32(a.v); }
BNB_FN float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }

// --- loads and stores --------------------------------------------------------------------------------

BNB_FN F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
BNB_FN F32 load(const bnb::Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
BNB_FN F32 load(const bnb::BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

BNB_FN __m256i narrow(bnb::Half*, F32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Not the conversion instruction of AVX512_BF16, which flushes subnormal results to zero.
BNB_FN __m256i narrow(bnb::BFloat16*, F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

BNB_FN void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
template <class T>
BNB_FN void store(T* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
}

BNB_FN I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
BNB_FN void store(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }

BNB_FN void stream(float* p, F32 a) { _mm512_stream_ps(p, a.v); }
template <class T>
BNB_FN void stream(T* p, F32 a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
}
BNB_FN void stream_fence() { _mm_sfence(); }

BNB_FN I32 load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
BNB_FN void store_bytes(uint8_t* p, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

// Eight bytes: each half of the lanes gets one dword and shifts its own nibble to the bottom.
BNB_FN I32 load_nibbles(const uint8_t* packed, int64_t index) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + (index >> 1)));
  const __m512i spread = _mm512_permutexvar_epi32(_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
                                                  _mm512_castsi128_si512(bytes));
  return {_mm512_srlv_epi32(spread, _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4))};
}
// A pair of lanes is one qword; its low byte becomes the packed byte.
BNB_FN void store_nibbles(uint8_t* packed, int64_t index, I32 a) {
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(a.v, 4), _mm512_srli_epi64(a.v, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + (index >> 1)), _mm512_cvtepi64_epi8(pairs));
}

// --- lookups -----------------------------------------------------------------------------------------

struct Table16 {
  __m512 entries;

  explicit Table16(const float* p) : entries(_mm512_loadu_ps(p)) {}
  explicit Table16(const int32_t* p) : entries(_mm512_castsi512_ps(_mm512_loadu_si512(p))) {}
};
BNB_FN F32 lookup(const Table16& table, I32 index) { return {_mm512_permutexvar_ps(index.v, table.entries)}; }

// Sixteen registers: eight permutes of 32 entries each, then a choice by the upper three bits of the
// index. Faster than a gather, which takes the lanes one by one.
struct Table256 {
  __m512 entries[16];

  explicit Table256(const float* p) {
    for (int i = 0; i < 16; ++i) {
      entries[i] = _mm512_loadu_ps(p + 16 * i);
    }
  }
};
BNB_FN F32 lookup(const Table256& table, I32 index) {
  __m512 part[8];
  for (int i = 0; i < 8; ++i) {
    part[i] = _mm512_permutex2var_ps(table.entries[2 * i], index.v, table.entries[2 * i + 1]);
  }
  const __mmask16 bit5 = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(32));
  const __mmask16 bit6 = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(64));
  const __mmask16 bit7 = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(128));
  for (int i = 0; i < 4; ++i) {
    part[i] = _mm512_mask_blend_ps(bit5, part[2 * i], part[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    part[i] = _mm512_mask_blend_ps(bit6, part[2 * i], part[2 * i + 1]);
  }
  return {_mm512_mask_blend_ps(bit7, part[0], part[1])};
}
BNB_FN F32 lookup(const Table256& table, const uint8_t* bytes) { return lookup(table, load_bytes(bytes)); }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
