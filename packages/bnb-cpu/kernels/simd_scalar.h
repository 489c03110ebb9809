// Vectors of one lane. Always built: it serves processors without a vector build, and tests compare the
// other instruction sets with it. This file also documents the interface that every simd_<name>.h has.
#pragma once

#include <bnb/dtypes.h>
#include <bnb/quant.h>

#include <cmath>

namespace bnb_cpu {
namespace BNB_ISA {

constexpr int kLanes = 1;

struct F32 {
  float v;
};
struct I32 {
  int32_t v;
};
struct Mask {
  bool v;
};

// --- loads and stores of kLanes elements; 16-bit values round to nearest even -----------------------

BNB_FN F32 load(const float* p) { return {*p}; }
BNB_FN F32 load(const bnb::Half* p) { return {bnb::to_float(*p)}; }
BNB_FN F32 load(const bnb::BFloat16* p) { return {bnb::to_float(*p)}; }
BNB_FN void store(float* p, F32 a) { *p = a.v; }
BNB_FN void store(bnb::Half* p, F32 a) { *p = bnb::to_half(a.v); }
BNB_FN void store(bnb::BFloat16* p, F32 a) { *p = bnb::to_bfloat16(a.v); }

BNB_FN I32 load(const int32_t* p) { return {*p}; }
BNB_FN void store(int32_t* p, I32 a) { *p = a.v; }

// Past the caches, for results larger than they are. `p` is aligned to the vector. A thread calls
// stream_fence() after its last one.
template <class T>
BNB_FN void stream(T* p, F32 a) {
  store(p, a);
}
BNB_FN void stream_fence() {}

// Bytes, zero-extended; the low bytes of the lanes.
BNB_FN I32 load_bytes(const uint8_t* p) { return {*p}; }
BNB_FN void store_bytes(uint8_t* p, I32 a) { *p = static_cast<uint8_t>(a.v); }

// The 4-bit codes of elements index, index + 1, ...; `index` is even unless kLanes is 1. Only the low four
// bits of a lane are defined. Storing takes lanes of 0 to 15.
BNB_FN I32 load_nibbles(const uint8_t* packed, int64_t index) {
  return {static_cast<int32_t>(bnb::nibble_at(packed, index))};
}
BNB_FN void store_nibbles(uint8_t* packed, int64_t index, I32 a) {
  uint8_t& byte = packed[index >> 1];
  byte = index & 1 ? static_cast<uint8_t>(byte | a.v) : static_cast<uint8_t>(a.v << 4);
}

// --- arithmetic ------------------------------------------------------------------------------------

BNB_FN F32 splat(float a) { return {a}; }
BNB_FN I32 splat(int32_t a) { return {a}; }

BNB_FN F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
BNB_FN F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
BNB_FN F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
BNB_FN F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
BNB_FN F32 sqrt(F32 a) { return {std::sqrt(a.v)}; }

// a * b + c with one rounding where the instruction set has it, with two where not: only for results
// that need not be the same bits everywhere.
BNB_FN F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }

// The second operand when either one is NaN.
BNB_FN F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
BNB_FN F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }

BNB_FN I32 operator+(I32 a, I32 b) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) + static_cast<uint32_t>(b.v))};
}
BNB_FN I32 operator-(I32 a, I32 b) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) - static_cast<uint32_t>(b.v))};
}
BNB_FN I32 operator&(I32 a, I32 b) { return {a.v & b.v}; }
BNB_FN I32 operator|(I32 a, I32 b) { return {a.v | b.v}; }
BNB_FN I32 operator^(I32 a, I32 b) { return {a.v ^ b.v}; }
BNB_FN I32 max(I32 a, I32 b) { return {a.v > b.v ? a.v : b.v}; }

// Logical shifts by a constant.
template <int kBits>
BNB_FN I32 shift_left(I32 a) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) << kBits)};
}
template <int kBits>
BNB_FN I32 shift_right(I32 a) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) >> kBits)};
}

// --- conversions -----------------------------------------------------------------------------------

BNB_FN I32 bits_of(F32 a) { return {static_cast<int32_t>(bnb::bits_of(a.v))}; }
BNB_FN F32 float_of(I32 a) { return {bnb::float_of(static_cast<uint32_t>(a.v))}; }

// Toward zero, and to the nearest integer with ties to even. NaN and values beyond int32 give
// INT32_MIN, except on AArch64 (where they saturate, NaN giving 0).
BNB_FN I32 truncate(F32 a) {
  return {a.v >= -2147483648.0f && a.v < 2147483648.0f ? static_cast<int32_t>(a.v) : INT32_MIN};
}
BNB_FN I32 round_to_int(F32 a) { return truncate({std::nearbyintf(a.v)}); }
BNB_FN F32 to_float(I32 a) { return {static_cast<float>(a.v)}; }

// --- comparisons; false on NaN -----------------------------------------------------------------------

BNB_FN Mask operator<=(F32 a, F32 b) { return {a.v <= b.v}; }
BNB_FN Mask operator<(F32 a, F32 b) { return {a.v < b.v}; }
BNB_FN Mask operator>(I32 a, I32 b) { return {a.v > b.v}; }
BNB_FN bool any(Mask a) { return a.v; }
BNB_FN F32 select(Mask m, F32 a, F32 b) { return m.v ? a : b; }
BNB_FN I32 select(Mask m, I32 a, I32 b) { return m.v ? a : b; }

// --- across lanes ------------------------------------------------------------------------------------

BNB_FN int32_t reduce_max(I32 a) { return a.v; }
BNB_FN float reduce_add(F32 a) { return a.v; }

// --- lookups -----------------------------------------------------------------------------------------

// 16 entries in registers, floats or the bits of integers; only the low four bits of an index lane count.
struct Table16 {
  const void* entries;

  explicit Table16(const float* p) : entries(p) {}
  explicit Table16(const int32_t* p) : entries(p) {}
};
BNB_FN F32 lookup(const Table16& table, I32 index) {
  F32 entry;
  memcpy(&entry.v, static_cast<const char*>(table.entries) + 4 * (index.v & 15), sizeof entry.v);
  return entry;
}

// 256 entries; index lanes are 0 to 255, or the bytes at an address.
struct Table256 {
  const float* entries;

  explicit Table256(const float* p) : entries(p) {}
};
BNB_FN F32 lookup(const Table256& table, I32 index) { return {table.entries[index.v]}; }
BNB_FN F32 lookup(const Table256& table, const uint8_t* bytes) { return lookup(table, load_bytes(bytes)); }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
