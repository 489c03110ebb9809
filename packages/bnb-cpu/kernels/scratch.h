// Temporary memory of a kernel call.
//
// Included by files that are compiled per instruction set: declarations only (see README.md).
#pragma once

#include <cstdint>

namespace bnb_cpu {

// At least `bytes` bytes, aligned to a cache line. Throws std::bad_alloc, so ask outside of parallel loops.
void* scratch_allocate(int64_t bytes);

void scratch_free(void* data);

}  // namespace bnb_cpu
