// Helpers of the native tests: checks, reproducible random numbers and arrays between guard pages.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/dispatch.h"

// Ends the program with the text when the condition does not hold. printf format and values follow.
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace testing {

using Random = std::mt19937_64;

// An integer in [low, high].
inline int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

template <class T>
T one_of(Random& random, const std::vector<T>& choices) {
  return choices[static_cast<size_t>(between(random, 0, static_cast<int64_t>(choices.size()) - 1))];
}

// Bytes between two pages that may not be touched, at the very end of the accessible ones or at the very
// beginning, so that one byte too many on that side ends the program. The rest of the pages is filled with
// a pattern and looked at in check(). Unlike an address sanitizer this sees masked vector accesses too.
class Guarded {
 public:
  enum Place { kAtEnd, kAtStart };

  Guarded(int64_t bytes, Place place) : bytes_(bytes) {
    const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + page - 1) / page * page;
    mapped_ = inner_ + 2 * page;
    void* map = mmap(nullptr, static_cast<size_t>(mapped_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED, "mmap of %lld bytes", static_cast<long long>(mapped_));
    map_ = static_cast<uint8_t*>(map);
    first_ = map_ + page;
    if (inner_ > 0) {
      CHECK(mprotect(first_, static_cast<size_t>(inner_), PROT_READ | PROT_WRITE) == 0, "mprotect");
      std::memset(first_, kPattern, static_cast<size_t>(inner_));
    }
    data_ = place == kAtEnd ? first_ + inner_ - bytes : first_;
  }
  ~Guarded() { munmap(map_, static_cast<size_t>(mapped_)); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

  void fill(const void* from) const {
    if (bytes_ > 0) {  // An empty vector has no address to copy from.
      std::memcpy(data_, from, static_cast<size_t>(bytes_));
    }
  }

  void check(const char* name) const {
    for (const uint8_t* p = first_; p < first_ + inner_; ++p) {
      CHECK((p >= data_ && p < data_ + bytes_) || *p == kPattern, "a byte outside of %s was written", name);
    }
  }

 private:
  static constexpr uint8_t kPattern = 0xa5;

  int64_t bytes_, inner_ = 0, mapped_ = 0;
  uint8_t *map_ = nullptr, *first_ = nullptr, *data_ = nullptr;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Values that have broken quantizers: `kind` 0 to 5.
inline float value_of_kind(Random& random, int kind) {
  const float normal = std::normal_distribution<float>()(random);
  switch (kind) {
    case 1:  // Multiples of 1/1536 meet midpoints of FP4 in a block whose largest value is 1.
      return static_cast<float>(between(random, -1536, 1536)) / 1536.0f;
    case 2:
      return normal * 1e-41f;
    case 3: {
      const int64_t draw = between(random, 0, 40);
      return draw == 0   ? float_of(0x7fc00000u)
             : draw == 1 ? float_of(0x7f800000u)
             : draw == 2 ? -float_of(0x7f800000u)
                         : normal;
    }
    case 4:
      return between(random, 0, 3) == 0 ? normal : 0.0f;
    case 5: {  // Any bits but those of a signalling NaN, which conversions may or may not make quiet.
      const uint32_t bits = static_cast<uint32_t>(random());
      return float_of((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x00400000u : bits);
    }
    default:
      return normal;
  }
}

inline const char* const kDtypeNames[] = {"float32", "float16", "bfloat16"};
inline int64_t size_of(int dtype) { return dtype == 0 ? 4 : 2; }

// The instruction sets to test, without "scalar", which they are compared with.
inline std::vector<std::string> vector_isas() {
  std::vector<std::string> names = bnb_cpu::supported_isas();
  names.pop_back();
  return names;
}

}  // namespace testing
