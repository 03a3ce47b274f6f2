// A device as the launchers see it: what it has, and what its code was compiled for. These are plain decisions, tested
// on the host; device.cu asks the driver.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

#ifdef BHYT_SIMT  // on the host, for tests: tests/cpp/simt.h
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace bhyt::cuda {

constexpr int kClusterSizes = 5;     // 1, 2, 4, 8, 16 blocks
constexpr int kPortableCluster = 8;  // every device with clusters takes these; a kernel must ask for larger ones

// The versions of a loaded kernel's PTX and of the machine code that runs: 90 for compute capability 9.0.
struct Code {
  int ptx = 0;
  int binary = 0;
};

struct Device {
  int index = 0;
  int multiprocessors = 1;
  bool hopper_or_later = false;  // has clusters and programmatic dependent launch, and so has the code it runs
  int64_t shared_bytes = 48 << 10;  // of a block, at most
  // How many clusters of 2^i blocks run at once, each block with a multiprocessor to itself; 0: none can.
  int resident_clusters[kClusterSizes] = {};
  Code code;
};

// The version of the code's PTX decides, not the device: PTX made for sm_80 and compiled for sm_90 when loaded still
// has no cluster instructions.
constexpr bool hopper_or_later(const Code& code) { return code.ptx >= 90; }

// Writes to *device only if every question was answered.
template <class Driver>
cudaError_t describe(const Driver& driver, int index, Device* device) {
  Device found;
  found.index = index;
  cudaError_t error = driver.multiprocessors(index, &found.multiprocessors);
  if (error == cudaSuccess) error = driver.shared_bytes(index, &found.shared_bytes);
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

// A device's description. The driver is asked once; after a failure the next call asks again.
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

// The same, and how many clusters of each size run at once: fewer where a GPU's parts have lost multiprocessors.
inline std::string text(const Device& device) {
  std::string clusters;
  for (int i = 1; device.hopper_or_later && i < kClusterSizes; ++i)
    clusters += (i == 1 ? "; clusters of " : ", ") + std::to_string(1 << i) + ": " +
                std::to_string(device.resident_clusters[i]);
  return text(device.code) + clusters + (clusters.empty() ? "" : " at once");
}

// The CUDA runtime linked in, and the newest that the driver supports: 13020 for 13.2, 0 for no driver.
struct Versions {
  int runtime = 0;
  int driver = 0;
};

inline std::string version_text(int version) {
  return version == 0 ? "none" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Empty if the driver supports the runtime's major version or a newer one. torch's own runtime may be older than this
// library's, and then work with a driver that this one does not work with.
inline std::string driver_problem(const Versions& v) {
  if (v.driver == 0 || v.driver / 1000 >= v.runtime / 1000) return "";
  return "built with CUDA " + version_text(v.runtime) + ", but the driver supports CUDA " + version_text(v.driver) +
         ": update the driver, or build bhyt with a CUDA " + std::to_string(v.driver / 1000) + " toolkit";
}

// For a device for which this library has only PTX.
inline std::string ptx_problem(const Versions& v) {
  return "no machine code for this device, only PTX of CUDA " + version_text(v.runtime) +
         ", which a driver for CUDA " + version_text(v.driver) +
         " cannot compile: update the driver, or build bhyt from source with BHYT_CUDA_ARCHS set for the device";
}

// Asks the driver about device `index`, which must be the current one.
cudaError_t describe(int index, Device* device);
Versions versions();

// The architectures compiled in, e.g. "sm_80 sm_90".
std::string archs();

}  // namespace bhyt::cuda
