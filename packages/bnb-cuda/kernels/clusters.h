// Clusters of thread blocks (compute capability 9.0): their launch, and rings that two of them fill for each other.
#pragma once

#include <utility>

#include "barriers.h"
#include "launch.h"

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
    arrive_at(drained, lane);
  }
}

// A persistent grid of clusters that take tiles in turn, at most one thread block on each multiprocessor.
inline dim3 cluster_grid(const Launch& launch, int64_t tiles, int cluster) {
  const int64_t most = launch.processors() / cluster;
  return dim3(static_cast<unsigned>((tiles < most ? tiles : most) * cluster));
}

// Launches a grid in clusters of `cluster` neighbours along its first dimension.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, int cluster,
                     const Launch& launch, const char* what, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace bnb_gpu
#endif
