// The only file that tells CUDA from HIP. Kernels use the names on the right-hand sides' left.
#pragma once

#include <cstdint>

#if defined(__HIPCC__) || defined(__HIP_PLATFORM_AMD__)
#define BNB_HIP 1
#include <hip/hip_bf16.h>
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#define gpuError_t hipError_t
#define gpuSuccess hipSuccess
#define gpuStream_t hipStream_t
#define gpuGetErrorString hipGetErrorString
#define gpuGetLastError hipGetLastError
#define gpuGetDevice hipGetDevice
#define gpuSetDevice hipSetDevice
#define gpuDeviceGetAttribute hipDeviceGetAttribute
#define gpuDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define gpuDevAttrComputeCapabilityMajor hipDeviceAttributeComputeCapabilityMajor
#define gpuDevAttrComputeCapabilityMinor hipDeviceAttributeComputeCapabilityMinor
#define gpuDevAttrManagedMemory hipDeviceAttributeManagedMemory
#define gpuMallocManaged hipMallocManaged
#define gpuMemAttachGlobal hipMemAttachGlobal
#define gpuFree hipFree
#define gpuStreamCaptureMode hipStreamCaptureMode
#define gpuStreamCaptureModeRelaxed hipStreamCaptureModeRelaxed
#define gpuThreadExchangeStreamCaptureMode hipThreadExchangeStreamCaptureMode
#define gpuStreamCaptureStatus hipStreamCaptureStatus
#define gpuStreamCaptureStatusNone hipStreamCaptureStatusNone
#define gpuStreamIsCapturing hipStreamIsCapturing
#define gpuMemsetAsync hipMemsetAsync
#define gpuFuncSetAttribute hipFuncSetAttribute
#define gpuOccupancyMaxActiveBlocksPerMultiprocessor hipOccupancyMaxActiveBlocksPerMultiprocessor
#define gpuFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize

using bfloat16_t = __hip_bfloat16;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define gpuError_t cudaError_t
#define gpuSuccess cudaSuccess
#define gpuStream_t cudaStream_t
#define gpuGetErrorString cudaGetErrorString
#define gpuGetLastError cudaGetLastError
#define gpuGetDevice cudaGetDevice
#define gpuSetDevice cudaSetDevice
#define gpuDeviceGetAttribute cudaDeviceGetAttribute
#define gpuDevAttrMultiProcessorCount cudaDevAttrMultiProcessorCount
#define gpuDevAttrComputeCapabilityMajor cudaDevAttrComputeCapabilityMajor
#define gpuDevAttrComputeCapabilityMinor cudaDevAttrComputeCapabilityMinor
#define gpuDevAttrManagedMemory cudaDevAttrManagedMemory
#define gpuMallocManaged cudaMallocManaged
#define gpuMemAttachGlobal cudaMemAttachGlobal
#define gpuFree cudaFree
#define gpuStreamCaptureMode cudaStreamCaptureMode
#define gpuStreamCaptureModeRelaxed cudaStreamCaptureModeRelaxed
#define gpuThreadExchangeStreamCaptureMode cudaThreadExchangeStreamCaptureMode
#define gpuStreamCaptureStatus cudaStreamCaptureStatus
#define gpuStreamCaptureStatusNone cudaStreamCaptureStatusNone
#define gpuStreamIsCapturing cudaStreamIsCapturing
#define gpuMemsetAsync cudaMemsetAsync
#define gpuFuncSetAttribute cudaFuncSetAttribute
#define gpuOccupancyMaxActiveBlocksPerMultiprocessor cudaOccupancyMaxActiveBlocksPerMultiprocessor
#define gpuFuncAttributeMaxDynamicSharedMemorySize cudaFuncAttributeMaxDynamicSharedMemorySize

using bfloat16_t = __nv_bfloat16;
#endif

using half_t = __half;

// The NVIDIA architecture that device code is compiled for; 0 elsewhere.
#if !defined(BNB_HIP) && defined(__CUDA_ARCH__)
#define BNB_DEVICE_ARCH __CUDA_ARCH__
#else
#define BNB_DEVICE_ARCH 0
#endif

namespace bnb_gpu {

// Kernels are written for groups of 32 lanes. On a processor with wider wavefronts the group is half
// of one; shuffles name their width and therefore work in both.
constexpr int kLanes = 32;

#if defined(BNB_HIP) && defined(__HIPCC__)
__device__ __forceinline__ bool group_any(bool value) {
  const int half = (threadIdx.x % warpSize) / kLanes;
  return (__ballot(value) >> (half * kLanes) & 0xffffffffull) != 0;
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane, int width = kLanes) {
  return __shfl(value, lane & (width - 1), width);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask, int width = kLanes) {
  return __shfl_xor(value, mask, width);
}
#elif defined(__CUDACC__)
__device__ __forceinline__ bool group_any(bool value) { return __any_sync(0xffffffffu, value); }
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane, int width = kLanes) {
  return __shfl_sync(0xffffffffu, value, lane, width);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask, int width = kLanes) {
  return __shfl_xor_sync(0xffffffffu, value, mask, width);
}
#endif

}  // namespace bnb_gpu
