// Asynchronous copies from global to shared memory (compute capability 8.0 and later; elsewhere they do not return
// before they are done).
#pragma once

#include "gemm4.h"

namespace bnb_gpu {

// Copies 16 bytes, or fills them with zeros where there is nothing to copy.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#if BNB_DEVICE_ARCH >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if BNB_DEVICE_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if BNB_DEVICE_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace bnb_gpu
