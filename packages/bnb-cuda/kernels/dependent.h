// Programmatic dependent launch (compute capability 9.0 and later): a kernel begins while the one ahead of it in the
// stream is still at work, and sets up what is its own. Elsewhere these are ordinary launches.
//
// Before `wait_for_kernel_ahead` a kernel neither reads what others may have written nor writes what they may read. It
// may prefetch into the second-level cache, all the same who writes there. Each thread that reads or writes global
// memory waits, and pointers go through `after_wait`.
#pragma once

#include <utility>

#include "launch.h"

namespace bnb_gpu {

// Until all thread blocks of the kernel ahead have ended, and what they wrote can be seen.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if BNB_DEVICE_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel behind may begin as soon as all thread blocks of this one have got here, wherever there is room.
__device__ __forceinline__ void let_kernel_behind_begin() {
#if BNB_DEVICE_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same pointer, through which nothing is read before the wait that is ahead of this. The compiler takes memory
// behind parameters of a kernel that are `const` and `__restrict__` for constant, and moves reads of it anywhere.
template <class T>
__device__ __forceinline__ T* after_wait(T* pointer) {
#if BNB_DEVICE_ARCH >= 900
  asm volatile("" : "+l"(pointer)::"memory");
#endif
  return pointer;
}

// Stages of a ring to prefetch. A few bridge the time until the ring runs; more only stand in the way of the kernel
// ahead and of the ring itself (measured: with all stages, products with one row take up to 20 % longer than without
// any).
constexpr int kPrefetchedStages = 2;

// Brings the bytes around an address into the second-level cache.
__device__ __forceinline__ void prefetch(const void* from) {
#if BNB_DEVICE_ARCH >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// The same for bytes in a row, both address and number a multiple of 16.
__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
#if BNB_DEVICE_ARCH >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// A grid of thread blocks, in clusters of neighbours along its first dimension.
struct Grid {
  dim3 blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
};

// Launches a kernel that waits for the one ahead of it by itself.
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), const Grid& grid, const Launch& launch, const char* what,
                      Arguments&&... arguments) {
#ifdef BNB_HIP
  kernel<<<grid.blocks, grid.threads, grid.shared_bytes, launch.stream()>>>(std::forward<Arguments>(arguments)...);
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = launch.stream();
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (launch.capability() >= 90) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& together = attributes[config.numAttrs++];
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = grid.cluster;
    together.val.clusterDim.y = 1;
    together.val.clusterDim.z = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
#endif
}

}  // namespace bnb_gpu
