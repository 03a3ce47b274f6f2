// A device as the launchers see it: what it has, and what the code that it runs was compiled for. Plain decisions,
// tested on the host; device.cu asks the driver.
#pragma once

#include <mutex>
#include <string>

#ifdef BHYT_SIMT  // on the host, for tests: tests/cpp/simt.h
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace bhyt::cuda {

constexpr int kClusterSizes = 5;     // 1, 2, 4, 8, 16 blocks
constexpr int kPortableCluster = 8;  // the largest that all devices with clusters take; more, a kernel must ask for

// Of a loaded kernel, 90 for compute capability 9.0: the PTX it was made from, and the machine code that runs.
struct Code {
  int ptx = 0;
  int binary = 0;
};

struct Device {
  int index = 0;
  int multiprocessors = 1;
  bool hopper_or_later = false;  // has clusters and programmatic dependent launch, and so has the code it runs
  // How many clusters of 2^i blocks run at once, each block with a multiprocessor to itself; 0: none can.
  int resident_clusters[kClusterSizes] = {};
  Code code;
};

// Not the device is asked but the code: compiled anew for it when loaded, PTX of older ones still lacks both.
constexpr bool hopper_or_later(const Code& code) { return code.ptx >= 90; }

// Writes to *device only what was answered in full.
template <class Driver>
cudaError_t describe(const Driver& driver, int index, Device* device) {
  Device found;
  found.index = index;
  cudaError_t error = driver.multiprocessors(index, &found.multiprocessors);
  if (error == cudaSuccess) error = driver.code(&found.code);
  if (error != cudaSuccess) return error;
  found.hopper_or_later = hopper_or_later(found.code);
  for (int i = 1; found.hopper_or_later && i < kClusterSizes; ++i) {
    error = driver.resident_clusters(1 << i, found.multiprocessors, &found.resident_clusters[i]);
    if (error != cudaSuccess) return error;
  }
  *device = found;
  return cudaSuccess;
}

// A device's description, asked for once: one that failed is asked for again by the next call.
class Description {
 public:
  template <class Query>  // cudaError_t query(Device*)
  cudaError_t get(Query&& query, const Device** device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!known_) {
      const cudaError_t error = query(&device_);
      if (error != cudaSuccess) return error;
      known_ = true;
    }
    *device = &device_;
    return cudaSuccess;
  }

 private:
  std::mutex mutex_;
  bool known_ = false;
  Device device_;
};

// For `python -m bhyt`.
inline std::string text(const Code& code) {
  const std::string binary = "sm_" + std::to_string(code.binary);
  if (code.ptx == code.binary) return "machine code of " + binary;
  const std::string made = "PTX of compute_" + std::to_string(code.ptx) + ", compiled for " + binary + " when loaded";
  return code.binary < 90 || hopper_or_later(code) ? made : made + ": no clusters, long rows are slower";
}

// Of the CUDA runtime linked in, and the newest that the driver supports: 13020 for 13.2, 0 for no driver.
struct Versions {
  int runtime = 0;
  int driver = 0;
};

inline std::string version_text(int version) {
  return version == 0 ? "none" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Empty where the driver will do: of the runtime's major version, or newer. torch's own runtime may be older than this
// library's, and so be served by a driver that this one is not.
inline std::string driver_problem(const Versions& v) {
  if (v.driver == 0 || v.driver / 1000 >= v.runtime / 1000) return "";
  return "built with CUDA " + version_text(v.runtime) + ", but the driver supports CUDA " + version_text(v.driver) +
         ": update the driver, or build bhyt with a CUDA " + std::to_string(v.driver / 1000) + " toolkit";
}

// Of a device that this library has PTX alone for.
inline std::string ptx_problem(const Versions& v) {
  return "no machine code for this device, only PTX of CUDA " + version_text(v.runtime) +
         ", which a driver for CUDA " + version_text(v.driver) +
         " cannot compile: update the driver, or build bhyt from source with BHYT_CUDA_ARCHS set for the device";
}

// Asks the driver about the current device, which is `index`.
cudaError_t describe(int index, Device* device);
Versions versions();

// The architectures compiled in, e.g. "sm_80 sm_90".
std::string archs();

}  // namespace bhyt::cuda
