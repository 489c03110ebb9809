// Vectors of 4 lanes: AArch64 Advanced SIMD. The interface is described in simd_scalar.h.
#pragma once

// For #if inside kernels. Not the compiler's own macro, which holds in the scalar build too.
#define BNB_NEON 1

#include <arm_neon.h>
#include <bnb/dtypes.h>
#include <bnb/quant.h>

namespace bnb_cpu {
namespace BNB_ISA {

constexpr int kLanes = 4;

struct F32 {
  float32x4_t v;
};
struct I32 {
  int32x4_t v;
};
struct Mask {
  uint32x4_t v;
};

BNB_FN F32 splat(float a) { return {vdupq_n_f32(a)}; }
BNB_FN I32 splat(int32_t a) { return {vdupq_n_s32(a)}; }

BNB_FN F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
BNB_FN F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
BNB_FN F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
BNB_FN F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
BNB_FN F32 sqrt(F32 a) { return {vsqrtq_f32(a.v)}; }
BNB_FN F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// By comparison, since the instructions return NaN where the interface asks for the second operand.
BNB_FN F32 min(F32 a, F32 b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
BNB_FN F32 max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }

BNB_FN I32 operator+(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
BNB_FN I32 operator-(I32 a, I32 b) { return {vsubq_s32(a.v, b.v)}; }
BNB_FN I32 operator&(I32 a, I32 b) { return {vandq_s32(a.v, b.v)}; }
BNB_FN I32 operator|(I32 a, I32 b) { return {vorrq_s32(a.v, b.v)}; }
BNB_FN I32 operator^(I32 a, I32 b) { return {veorq_s32(a.v, b.v)}; }
BNB_FN I32 max(I32 a, I32 b) { return {vmaxq_s32(a.v, b.v)}; }

template <int kBits>
BNB_FN I32 shift_left(I32 a) {
  return {vshlq_n_s32(a.v, kBits)};
}
template <int kBits>
BNB_FN I32 shift_right(I32 a) {
  return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), kBits))};
}

BNB_FN I32 bits_of(F32 a) { return {vreinterpretq_s32_f32(a.v)}; }
BNB_FN F32 float_of(I32 a) { return {vreinterpretq_f32_s32(a.v)}; }
BNB_FN I32 truncate(F32 a) { return {vcvtq_s32_f32(a.v)}; }
BNB_FN I32 round_to_int(F32 a) { return {vcvtnq_s32_f32(a.v)}; }
BNB_FN F32 to_float(I32 a) { return {vcvtq_f32_s32(a.v)}; }

BNB_FN Mask operator<=(F32 a, F32 b) { return {vcleq_f32(a.v, b.v)}; }
BNB_FN Mask operator<(F32 a, F32 b) { return {vcltq_f32(a.v, b.v)}; }
BNB_FN Mask operator>(I32 a, I32 b) { return {vcgtq_s32(a.v, b.v)}; }
BNB_FN bool any(Mask a) { return vmaxvq_u32(a.v) != 0; }
BNB_FN F32 select(Mask m, F32 a, F32 b) { return {vbslq_f32(m.v, a.v, b.v)}; }
BNB_FN I32 select(Mask m, I32 a, I32 b) { return {vbslq_s32(m.v, a.v, b.v)}; }

BNB_FN int32_t reduce_max(I32 a) { return vmaxvq_s32(a.v); }
BNB_FN float reduce_add(F32 a) { return vaddvq_f32(a.v); }

// --- loads and stores --------------------------------------------------------------------------------

BNB_FN F32 load(const float* p) { return {vld1q_f32(p)}; }
BNB_FN F32 load(const bnb::Half* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
BNB_FN F32 load(const bnb::BFloat16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}

BNB_FN void store(float* p, F32 a) { vst1q_f32(p, a.v); }
BNB_FN void store(bnb::Half* p, F32 a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}
BNB_FN void store(bnb::BFloat16* p, F32 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t high = vshrq_n_u32(bits, 16);
  const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff)), 16);
  const uint32x4_t number = vceqq_f32(a.v, a.v);
  const uint32x4_t result = vbslq_u32(number, rounded, vorrq_u32(high, vdupq_n_u32(0x40)));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(result));
}

BNB_FN I32 load(const int32_t* p) { return {vld1q_s32(p)}; }
BNB_FN void store(int32_t* p, I32 a) { vst1q_s32(p, a.v); }

// AArch64 has no vector store past the caches that compilers expose; cores detect streams of full lines.
template <class T>
BNB_FN void stream(T* p, F32 a) {
  store(p, a);
}
BNB_FN void stream_fence() {}

BNB_FN I32 load_bytes(const uint8_t* p) {
  uint32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  const uint16x8_t words = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)));
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words)))};
}
BNB_FN void store_bytes(uint8_t* p, I32 a) {
  const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(a.v));
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
  memcpy(p, &bytes, sizeof bytes);
}

BNB_FN I32 load_nibbles(const uint8_t* packed, int64_t index) {
  uint16_t bytes;
  memcpy(&bytes, packed + (index >> 1), sizeof bytes);
  const int32x4_t shifts = {-4, 0, -12, -8};
  return {vreinterpretq_s32_u32(vshlq_u32(vdupq_n_u32(bytes), shifts))};
}
BNB_FN void store_nibbles(uint8_t* packed, int64_t index, I32 a) {
  const int32x4_t shifts = {4, 0, 12, 8};
  const uint16_t bytes = static_cast<uint16_t>(vaddvq_u32(vreinterpretq_u32_s32(vshlq_s32(a.v, shifts))));
  memcpy(packed + (index >> 1), &bytes, sizeof bytes);
}

// --- lookups -----------------------------------------------------------------------------------------

// The table instruction works on bytes: lane index i becomes the bytes 4i, 4i+1, 4i+2, 4i+3.
struct Table16 {
  uint8x16x4_t entries;

  explicit Table16(const float* p) : entries(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(p))) {}
  explicit Table16(const int32_t* p) : entries(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(p))) {}
};
BNB_FN F32 lookup(const Table16& table, I32 index) {
  const uint32x4_t entry = vandq_u32(vreinterpretq_u32_s32(index.v), vdupq_n_u32(15));
  const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), entry, 0x04040404);
  return {vreinterpretq_f32_u8(vqtbl4q_u8(table.entries, vreinterpretq_u8_u32(bytes)))};
}

struct Table256 {
  const float* entries;

  explicit Table256(const float* p) : entries(p) {}
};
BNB_FN F32 lookup(const Table256& table, I32 index) {
  const float* p = table.entries;
  const float values[4] = {p[vgetq_lane_s32(index.v, 0)], p[vgetq_lane_s32(index.v, 1)], p[vgetq_lane_s32(index.v, 2)],
                           p[vgetq_lane_s32(index.v, 3)]};
  return {vld1q_f32(values)};
}
BNB_FN F32 lookup(const Table256& table, const uint8_t* bytes) { return lookup(table, load_bytes(bytes)); }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
