// What the operating system is told about memory.
#pragma once

#include <cstdint>

namespace bnb_cpu {

// Asks for huge pages under a result that nothing has been written to yet. The kernel maps and clears
// memory on its first use, page by page: for a large result that takes several times as long as computing
// it, and with huge pages a fraction of that. Only whole huge pages inside the array are asked for, so
// that it takes no more memory than it would have. Does nothing where there is no such request.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace bnb_cpu
