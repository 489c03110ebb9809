// Descriptions of matrices for the copy engine of compute capability 9.0, which brings boxes of them into
// shared memory, zeros where a box reaches beyond the matrix.
#pragma once

#include <type_traits>

#include "barriers.h"
#include "launch.h"

#ifndef BNB_HIP
#include <cuda.h>

namespace bnb_gpu {

// The driver's function, found at run time: the module does not link with the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "asking for the driver's cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("bnb-cuda: the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.0");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// Sizes, strides in bytes of all dimensions but the first, and sizes of a box; the first dimension is contiguous.
template <int kRank>
CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank],
                       CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) {
    step = 1;
  }
  const CUresult status = tensor_map_encoder()(&map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("bnb-cuda: the driver refused to describe a matrix, error " + std::to_string(status));
  }
  return map;
}

// A matrix with contiguous rows of `columns` elements, and boxes of `box_rows` x `box_columns`. Swizzled boxes have
// rows of as many bytes as the name says; with 128 they lie as the matrix units want them.
inline CUtensorMap matrix_map(const void* data, CUtensorMapDataType type, int element_bytes, int64_t rows,
                              int64_t columns, int box_rows, int box_columns,
                              CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE) {
  return tensor_map<2>(data, type, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                       {static_cast<cuuint64_t>(columns) * element_bytes},
                       {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, swizzle);
}

// Rows of activations of each of so many tiles, which share them evenly. Rows that a matrix does not have take the copy
// engine long, which fills them with zeros; rows beyond a tile are not asked for, and no product of theirs is kept.
inline int tile_share(int64_t rows, int64_t tiles) {
  constexpr int kGroup = 8;  // lies in one piece under the swizzle
  return static_cast<int>(ceil_div(ceil_div(rows, tiles), kGroup) * kGroup);
}

// Where boxes whose rows are swizzled over 128 bytes begin in shared memory.
constexpr int kBoxAlignment = 1024;

// A matrix of bytes, `row_bytes` a multiple of 128, as a row of boxes of `box_rows` x 128 bytes, swizzled, of which
// `boxes` neighbours are brought at once.
inline CUtensorMap folded_map(const void* data, int64_t rows, int64_t row_bytes, int box_rows, int boxes) {
  constexpr int kWidth = 128;
  return tensor_map<3>(data, CU_TENSOR_MAP_DATA_TYPE_UINT8,
                       {kWidth, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(row_bytes / kWidth)},
                       {static_cast<cuuint64_t>(row_bytes), kWidth},
                       {kWidth, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(boxes)},
                       CU_TENSOR_MAP_SWIZZLE_128B);
}

// Copies the box that begins at this column and row, and has the barrier count its bytes.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
#if BNB_BULK_COPIES
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Makes this thread's writes to global memory visible to the copy engine, or lets it see what this thread sees.
__device__ __forceinline__ void publish_to_copy_engine() {
#if BNB_BULK_COPIES
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// Has the copy engine write a box of shared memory to where it begins at this column and row; what of it lies beyond
// the matrix stays unwritten.
__device__ __forceinline__ void write_box(const CUtensorMap& map, int column, int row, const void* from) {
#if BNB_BULK_COPIES
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\ncp.async.bulk.commit_group;" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(column), "r"(row), "r"(shared_address(from))
      : "memory");
#endif
}

// Until the shared memory of all boxes that this thread has had written may be used again.
__device__ __forceinline__ void wait_for_reads_of_writes() {
#if BNB_BULK_COPIES
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// Until these boxes are written.
__device__ __forceinline__ void wait_for_writes() {
#if BNB_BULK_COPIES
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// Has the copy engine read a description ahead of its first use.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
#if BNB_BULK_COPIES
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
#endif
}

// Brings the box into the second-level cache only.
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, int column, int row) {
#if BNB_BULK_COPIES
  asm volatile(
      "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(reinterpret_cast<uint64_t>(&map)),
      "r"(column), "r"(row)
      : "memory");
#endif
}

// The boxes of a folded matrix that begin at this row and are neighbours from this one on.
__device__ __forceinline__ void copy_boxes(void* to, const CUtensorMap& map, int row, int box, uint64_t* barrier) {
#if BNB_BULK_COPIES
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(0), "r"(row), "r"(box), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Brings them into the second-level cache only.
__device__ __forceinline__ void prefetch_boxes(const CUtensorMap& map, int row, int box) {
#if BNB_BULK_COPIES
  asm volatile(
      "cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(reinterpret_cast<uint64_t>(&map)),
      "r"(0), "r"(row), "r"(box)
      : "memory");
#endif
}

// `copy_box` into the shared memory of all thread blocks of the cluster that are in `ranks`, at the same place, where
// their barriers at the same place count the bytes.
__device__ __forceinline__ void copy_box_to(unsigned short ranks, void* to, const CUtensorMap& map, int column, int row,
                                            uint64_t* barrier) {
#if BNB_BULK_COPIES
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(ranks)
      : "memory");
#endif
}

// The element type of 16-bit activations.
template <class T>
constexpr CUtensorMapDataType tensor_map_type() {
  return std::is_same_v<T, half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

}  // namespace bnb_gpu
#endif
