// Temporary arrays of a kernel call.
#pragma once

#include "scratch.h"
#include "simd-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// One allocation that is cut into arrays, each on its own cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(static_cast<char*>(scratch_allocate(bytes))), next_(data_) {}
  ~Scratch() { scratch_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    return p;
  }

  template <class T>
  static constexpr int64_t bytes_for(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* data_;
  char* next_;
};

}  // namespace BNB_ISA
}  // namespace bnb_cpu
