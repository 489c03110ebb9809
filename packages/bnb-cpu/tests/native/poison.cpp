// Temporary memory of kernels full of NaN, whichever type it is read as: padding that a kernel forgets to
// clear then shows in its results, instead of depending on what the memory held before.
#include <cstdlib>
#include <cstring>
#include <new>

void* operator new(std::size_t size, std::align_val_t alignment) {
  const auto unit = static_cast<std::size_t>(alignment), rounded = (size / unit + 1) * unit;
  void* data = std::aligned_alloc(unit, rounded);
  if (data == nullptr) {
    throw std::bad_alloc();
  }
  return std::memset(data, 0xff, rounded);
}

void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }
