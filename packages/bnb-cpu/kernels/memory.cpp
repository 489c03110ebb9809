#include "memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bnb_cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
void advise_huge_pages(void* data, int64_t bytes) {
  // The size on x86-64 and on AArch64 with pages of 4 KiB; a larger page just finds no whole one inside.
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) {
    // A refusal, for instance by a kernel built without huge pages, changes nothing but the speed.
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
  }
}
#else
void advise_huge_pages(void*, int64_t) {}
#endif

}  // namespace bnb_cpu
