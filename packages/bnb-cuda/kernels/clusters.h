// Clusters of thread blocks (compute capability 9.0): their grids, and rings that two of them fill for each other.
#pragma once

#include "barriers.h"
#include "dependent.h"

#ifndef BNB_HIP

namespace bnb_gpu {

// Tells that a warp of a math group is through with a stage of the ring, for which all thread blocks of the cluster
// wait.
template <int kCluster>
class StageRelease {
 public:
  // `drained`: the barriers of the stages.
  __device__ __forceinline__ StageRelease(uint64_t* drained, int lane)
      : there_(address_at(drained, lane % kCluster)), lane_(lane) {}

  __device__ __forceinline__ void operator()(int stage) const {
    __syncwarp();
    if (lane_ < kCluster) {
      arrive_at(there_ + static_cast<unsigned>(stage) * static_cast<unsigned>(sizeof(uint64_t)));
    }
  }

 private:
  unsigned there_;  // the first barrier of the thread block that this lane tells
  int lane_;
};

// A persistent grid of clusters that take tiles in turn, at most one thread block on each multiprocessor.
inline Grid cluster_grid(const Launch& launch, int64_t tiles, int threads, int shared_bytes, int cluster) {
  const int64_t most = launch.processors() / cluster;
  return {dim3(static_cast<unsigned>((tiles < most ? tiles : most) * cluster)), threads, shared_bytes, cluster};
}

}  // namespace bnb_gpu
#endif
