#include "scratch.h"

#include <cstddef>
#include <new>

namespace bnb_cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void* scratch_allocate(int64_t bytes) { return ::operator new(static_cast<size_t>(bytes), kAlignment); }

void scratch_free(void* data) { ::operator delete(data, kAlignment); }

}  // namespace bnb_cpu
