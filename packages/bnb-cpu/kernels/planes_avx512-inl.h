// Look-ups in a table of 256 floats for 64 indices at a time: each byte of the entries has a table of its own, of 256
// bytes. For AVX-512 VBMI.
#pragma once

#include "simd-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

constexpr int kPlaneBytes = 4 * 256;

// `planes` has kPlaneBytes.
BNB_FN void split_into_planes(const float* entries, uint8_t* planes) {
  for (int i = 0; i < 256; i += kLanes) {
    const __m512i bits = _mm512_loadu_si512(entries + i);
    const __m128i bytes[4] = {_mm512_cvtepi32_epi8(bits), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)),
                              _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 16)),
                              _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 24))};
    for (int plane = 0; plane < 4; ++plane) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + 256 * plane + i), bytes[plane]);
    }
  }
}

struct Planes256 {
  __m512i tables[4][4];
  __m512i order;

  explicit Planes256(const uint8_t* planes) {
    for (int plane = 0; plane < 4; ++plane) {
      for (int i = 0; i < 4; ++i) {
        tables[plane][i] = _mm512_loadu_si512(planes + 256 * plane + 64 * i);
      }
    }
    // Bytes are put together within quarters of a register: byte 4 j + i of quarter q becomes entry 4 q + i of
    // vector j.
    const __m512i first = _mm512_set4_epi32(0x33323130, 0x23222120, 0x13121110, 0x03020100);
    const __m512i quarter =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi8(4), 1)),
                           _mm256_inserti128_si256(_mm256_set1_epi8(8), _mm_set1_epi8(12), 1), 1);
    order = _mm512_add_epi8(first, quarter);
  }
};

// The entries of 64 indices in memory, in their order.
BNB_FN void lookup64(const Planes256& planes, const uint8_t* indices, F32 (&found)[4]) {
  const __m512i index = _mm512_permutexvar_epi8(planes.order, _mm512_loadu_si512(indices));
  const __mmask64 upper = _mm512_movepi8_mask(index);
  __m512i bytes[4];
  for (int plane = 0; plane < 4; ++plane) {
    const __m512i(&table)[4] = planes.tables[plane];
    bytes[plane] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], index, table[1]),
                                          _mm512_permutex2var_epi8(table[2], index, table[3]));
  }
  const __m512i low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
  const __m512i high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
  for (int half = 0; half < 2; ++half) {
    found[2 * half].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[half], high[half]));
    found[2 * half + 1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[half], high[half]));
  }
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
