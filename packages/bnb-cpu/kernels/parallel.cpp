#include "parallel.h"

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace bnb_cpu {
namespace {

std::atomic<bool> forked{false};

#ifndef _WIN32
// Registered when the library is loaded: by then torch may have started the runtime's threads, even if
// this module has not.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

int64_t part_bound(int64_t count, int64_t part, int64_t parts) {
  const int64_t quotient = count / parts, remainder = count % parts;
  return part * quotient + (part < remainder ? part : remainder);
}

}  // namespace

void parallel_for(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) {
    return;
  }
  const int64_t most = grain > 0 ? count / grain : count;
  const int64_t parts = most < threads ? most : threads;
#ifdef _OPENMP
  if (parts > 1 && !forked && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(parts))
    {
      // The runtime may grant fewer threads than asked for.
      const int64_t granted = omp_get_num_threads(), part = omp_get_thread_num();
      body(context, part_bound(count, part, granted), part_bound(count, part + 1, granted));
    }
    return;
  }
#endif
  body(context, 0, count);
}

}  // namespace bnb_cpu
