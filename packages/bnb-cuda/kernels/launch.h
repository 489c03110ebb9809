// Host side of a launch: the right device, the grid, errors with names, element types.
#pragma once

#include <bnb/dtypes.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "architectures.h"
#include "vendor.h"

namespace bnb_gpu {

inline void check(gpuError_t status, const char* what) {
  if (status != gpuSuccess) {
    throw std::runtime_error(std::string("bnb-cuda: ") + what + ": " + gpuGetErrorString(status));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMaxDevices = 64;

// Properties of a device, read once.
struct DeviceInfo {
  int processors;
  int capability;  // 90 for compute capability 9.0: of the code that the device runs, which may be older than itself
};

// The architecture of the code for a device.
inline int code_of(int capability) {
#ifdef BNB_CUDA_ARCHITECTURES
  const int architecture = architecture_for(BNB_CUDA_ARCHITECTURES, capability);
  if (architecture == 0) {
    throw std::runtime_error("bnb-cuda: this build has no code for compute capability " +
                             std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
                             ", only for " BNB_CUDA_ARCHITECTURES
                             "; install a wheel of bnb-cuda, or build with CUDAARCHS=" +
                             std::to_string(capability));
  }
  return architecture;
#else
  return capability;
#endif
}

inline const DeviceInfo& device_info(int device) {
  static DeviceInfo known[kMaxDevices] = {};
  DeviceInfo& info = known[device];
  if (info.processors == 0) {
    int processors = 0, major = 0, minor = 0;
    check(gpuDeviceGetAttribute(&processors, gpuDevAttrMultiProcessorCount, device), "reading device attributes");
    check(gpuDeviceGetAttribute(&major, gpuDevAttrComputeCapabilityMajor, device), "reading device attributes");
    check(gpuDeviceGetAttribute(&minor, gpuDevAttrComputeCapabilityMinor, device), "reading device attributes");
    info.capability = code_of(major * 10 + minor);
    info.processors = processors;
  }
  return info;
}

// Where a kernel runs. Makes the device current while it exists; torch's current device may be another.
class Launch {
 public:
  Launch(int device, uintptr_t stream) : stream_(reinterpret_cast<gpuStream_t>(stream)), device_(device) {
    check(gpuGetDevice(&previous_), "asking for the current device");
    if (previous_ != device_) {
      check(gpuSetDevice(device_), "switching device");
    }
  }
  ~Launch() {
    if (previous_ != device_) {
      (void)gpuSetDevice(previous_);
    }
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  gpuStream_t stream() const { return stream_; }
  int processors() const { return device_info(device_).processors; }
  int capability() const { return device_info(device_).capability; }
  int device() const { return device_; }

  // Thread blocks of a persistent grid: enough for the work, at most `per_processor` on each.
  unsigned grid(int64_t work, int per_processor) const {
    const int64_t most = static_cast<int64_t>(processors()) * per_processor;
    return static_cast<unsigned>(work < most ? (work > 0 ? work : 1) : most);
  }

 private:
  gpuStream_t stream_;
  int device_;
  int previous_ = 0;
};

// Lets a kernel use more shared memory than any kernel may; asks the driver once per device. One static
// object per kernel.
class SharedMemoryLimit {
 public:
  void raise(const Launch& launch, const void* kernel, int bytes) {
    std::atomic<bool>& raised = raised_[launch.device()];
    if (!raised.load(std::memory_order_acquire)) {
      check(gpuFuncSetAttribute(kernel, gpuFuncAttributeMaxDynamicSharedMemorySize, bytes), "asking for shared memory");
      raised.store(true, std::memory_order_release);
    }
  }

 private:
  std::atomic<bool> raised_[kMaxDevices] = {};
};

// Thread blocks of a persistent grid: as many as the device holds at once, so that all of them get the same
// share of the work, or fewer for little work. Asks the driver once per device; one static object per kernel.
class ResidentGrid {
 public:
  unsigned operator()(const Launch& launch, const void* kernel, int threads, int64_t work) {
    std::atomic<int>& known = per_processor_[launch.device()];
    int per_processor = known.load(std::memory_order_relaxed);
    if (per_processor == 0) {
      check(gpuOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0), "asking for occupancy");
      known.store(per_processor, std::memory_order_relaxed);
    }
    return launch.grid(work, per_processor);
  }

 private:
  std::atomic<int> per_processor_[kMaxDevices] = {};
};

inline void check_launch(const char* kernel) { check(gpuGetLastError(), kernel); }

template <class T>
struct Type {
  using type = T;
};

// Calls `body` with Type<T>{} for the element type of `dtype`, a number of bnb::Dtype.
template <class Body>
void with_dtype(int dtype, Body&& body) {
  switch (static_cast<bnb::Dtype>(dtype)) {
    case bnb::Dtype::kFloat32:
      return body(Type<float>{});
    case bnb::Dtype::kFloat16:
      return body(Type<half_t>{});
    case bnb::Dtype::kBFloat16:
      return body(Type<bfloat16_t>{});
  }
  throw std::invalid_argument("bnb-cuda: unknown dtype number " + std::to_string(dtype));
}

}  // namespace bnb_gpu
