// Barriers in shared memory that count arrivals and bytes, and bulk copies that arrive at them (compute
// capability 9.0 and later).
#pragma once

#include "gemm4.h"

#if !defined(BNB_HIP) && BNB_DEVICE_ARCH >= 900
#define BNB_BULK_COPIES 1
#else
#define BNB_BULK_COPIES 0
#endif

namespace bnb_gpu {

// Shared memory that a thread block may take for a ring and what goes with it, where it fills one with bulk copies.
constexpr int kSharedLimit = 226 * 1024;

// Has some of the warps wait for each other; barrier 0 is that of all of them.
__device__ __forceinline__ void synchronize_some(int barrier, int threads) {
#if BNB_BULK_COPIES
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// One thread calls this; `publish_barriers` and a barrier of the thread block follow.
__device__ __forceinline__ void initialize(uint64_t* barrier, int arrivals) {
#if BNB_BULK_COPIES
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

__device__ __forceinline__ void publish_barriers() {
#if BNB_BULK_COPIES
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
#if BNB_BULK_COPIES
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// The arrivals that a barrier counts of a warp. One stands for all lanes, which `__syncwarp` has brought together
// first; compute-sanitizer's racecheck does not see that, and reports what the others have done. Built with
// BNB_RACECHECK, each lane arrives for itself.
#ifdef BNB_RACECHECK
constexpr int kWarpArrivals = kLanes;
#else
constexpr int kWarpArrivals = 1;
#endif

// Arrives for a warp.
__device__ __forceinline__ void arrive_as_warp(uint64_t* barrier, int lane) {
#if BNB_BULK_COPIES
  __syncwarp();
  if (lane < kWarpArrivals) {
    arrive(barrier);
  }
#endif
}

// Where the same barrier of another thread block of the cluster lies.
__device__ __forceinline__ unsigned address_at(const uint64_t* barrier, int rank) {
  unsigned there = 0;
#if BNB_BULK_COPIES
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
#endif
  return there;
}

__device__ __forceinline__ void arrive_at(unsigned address) {
#if BNB_BULK_COPIES
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
#endif
}

// Arrives, and has the barrier wait for so many bytes besides.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
#if BNB_BULK_COPIES
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Waits until the phase of this parity is over; a fresh barrier counts as past the phase of parity 1.
__device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
#if BNB_BULK_COPIES
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::
          "r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// A word of global memory, and after it what was written before it.
__device__ __forceinline__ int load_acquiring(const int* from) {
  int value = 0;
#if BNB_BULK_COPIES
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
#endif
  return value;
}

// Copies bytes, a multiple of 16 between addresses that are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
#if BNB_BULK_COPIES
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// The parities of the passes through a ring of stages, for loops that are written out so that they know the slot.
struct RingParities {
  unsigned bits = 0;

  // The parity of this pass through a slot; the next question is about the next one.
  __device__ __forceinline__ int next(int slot) {
    const int parity = static_cast<int>(bits >> slot & 1u);
    bits ^= 1u << slot;
    return parity;
  }
};

// A place in a ring of stages, and the parity of the pass through it.
template <int kStages>
struct RingPlace {
  int slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace bnb_gpu
