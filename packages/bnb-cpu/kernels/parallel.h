// Loops over threads. The only place that knows of OpenMP is parallel.cpp.
//
// Included by files that are compiled per instruction set: declarations and code in the namespace of
// the instruction set only (see README.md).
#pragma once

#include <cstdint>

namespace bnb_cpu {

// Runs body(context, begin, end) on contiguous, disjoint parts of [0, count) that cover it, on at most
// `threads` threads and with no part shorter than `grain` unless it is the only one. The body must not
// throw. Returns when all parts are done. Runs on the calling thread alone when called from inside a
// parallel loop, or in a process forked from one that had loaded the module: the runtime's threads do
// not survive a fork.
void parallel_for(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

}  // namespace bnb_cpu
