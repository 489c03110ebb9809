// Clusters of thread blocks (compute capability 9.0): their grids, and rings that two of them fill for each other.
#pragma once

#include "barriers.h"
#include "dependent.h"

#ifndef BNB_HIP

namespace bnb_gpu {

// A warp of a math group is through with a stage; all thread blocks of the cluster wait for it.
template <int kCluster>
__device__ __forceinline__ void release_stage(uint64_t* drained, int lane) {
  __syncwarp();
  if constexpr (kCluster == 1) {
    if (lane == 0) {
      arrive(drained);
    }
  } else if (lane < kCluster) {
    arrive_at(address_at(drained, lane));
  }
}

// A persistent grid of clusters that take tiles in turn, at most one thread block on each multiprocessor.
inline Grid cluster_grid(const Launch& launch, int64_t tiles, int threads, int shared_bytes, int cluster) {
  const int64_t most = launch.processors() / cluster;
  return {dim3(static_cast<unsigned>((tiles < most ? tiles : most) * cluster)), threads, shared_bytes, cluster};
}

}  // namespace bnb_gpu
#endif
