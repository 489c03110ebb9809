// What differs between the compilers that read these headers: host C++17, CUDA, HIP, SYCL.
#pragma once

#include <cstdint>
#include <cstring>

// Marks a function for host and device. Always internal linkage: the same header is compiled into
// several object files with different instruction sets, and a shared inline symbol would let the
// linker keep the copy that needs the newest one.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define BNB_FN static __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define BNB_FN static __forceinline
#else
#define BNB_FN static inline __attribute__((always_inline))
#endif

namespace bnb {

BNB_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BNB_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Comparisons on the bits, so that they hold under any floating point flags.
BNB_FN bool is_nan(float value) { return (bits_of(value) & 0x7fffffffu) > 0x7f800000u; }

BNB_FN float magnitude(float value) { return float_of(bits_of(value) & 0x7fffffffu); }

}  // namespace bnb
