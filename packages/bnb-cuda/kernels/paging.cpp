// Managed memory: allocation and prefetching.
#include "kernels.h"

namespace bnb_gpu {

bool has_managed_memory(int device) {
  int value = 0;
  return gpuDeviceGetAttribute(&value, gpuDevAttrManagedMemory, device) == gpuSuccess && value != 0;
}

uintptr_t allocate_managed(int device, int64_t bytes) {
  const Launch launch(device, 0);
  void* address = nullptr;
  check(gpuMallocManaged(&address, bytes > 0 ? static_cast<size_t>(bytes) : 1, gpuMemAttachGlobal),
        "allocating paged memory");
  return reinterpret_cast<uintptr_t>(address);
}

void free_managed(uintptr_t address) {
  // Python frees when it likes to, maybe while a graph is captured, which this must not break.
  gpuStreamCaptureMode mode = gpuStreamCaptureModeRelaxed;
  (void)gpuThreadExchangeStreamCaptureMode(&mode);
  (void)gpuFree(reinterpret_cast<void*>(address));
  (void)gpuThreadExchangeStreamCaptureMode(&mode);
}

bool is_capturing(const Launch& launch) {
  gpuStreamCaptureStatus status = gpuStreamCaptureStatusNone;
  check(gpuStreamIsCapturing(launch.stream(), &status), "asking whether a stream is captured");
  return status != gpuStreamCaptureStatusNone;
}

void prefetch_managed(const Launch& launch, uintptr_t address, int64_t bytes, bool to_host) {
  const void* from = reinterpret_cast<const void*>(address);
#if defined(BNB_HIP)
  check(hipMemPrefetchAsync(from, bytes, to_host ? hipCpuDeviceId : launch.device(), launch.stream()),
        "prefetching paged memory");
#elif CUDART_VERSION >= 13000
  cudaMemLocation location = {};
  location.type = to_host ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  location.id = to_host ? 0 : launch.device();
  check(cudaMemPrefetchAsync(from, bytes, location, 0, launch.stream()), "prefetching paged memory");
#else
  check(cudaMemPrefetchAsync(from, bytes, to_host ? cudaCpuDeviceId : launch.device(), launch.stream()),
        "prefetching paged memory");
#endif
}

}  // namespace bnb_gpu
