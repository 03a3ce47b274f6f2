// What bhyt_cuda.cpp calls. No torch here or below.
#pragma once

#include <string>

#ifdef BHYT_SIMT  // on the host, for tests: tests/cpp/simt.h
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../params.h"

namespace bhyt::cuda {

constexpr int kClusterSizes = 4;  // 1, 2, 4, 8 blocks

struct Device {
  int index = 0;
  int multiprocessors = 1;
  bool hopper_or_later = false;  // has clusters and programmatic dependent launch, and so has the code it runs
  // How many clusters of 2^i blocks run at once, each block with a multiprocessor to itself; 0: none can.
  int resident_clusters[kClusterSizes] = {};
};

// Asks the driver about the current device, which is `index`.
cudaError_t describe(int index, Device* device);

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t stream);
cudaError_t forward_quantized(const ForwardParams& p, const Device& device, cudaStream_t stream);

// `workspace`: backward_workspace(p, device) bytes of scratch, aligned to 16.
int64_t backward_workspace(const BackwardParams& p, const Device& device);
cudaError_t backward(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t stream);

// The architectures compiled in, e.g. "sm_80 sm_90".
std::string archs();

}  // namespace bhyt::cuda
