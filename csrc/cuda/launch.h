// The CUDA kernels as their binding sees them; the calls go to the CUDA stream `on`. No torch headers.
#pragma once

#include "../params.h"
#include "device.h"

namespace bhyt::cuda {

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t on);
cudaError_t forward_quantized(const ForwardParams& p, const Device& device, cudaStream_t on);

// `workspace`: backward_workspace(p, device) bytes of scratch, aligned to 16.
int64_t backward_workspace(const BackwardParams& p, const Device& device);
cudaError_t backward(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on);

// The kernel that takes most of a multiprocessor. As many clusters of it as run at once are Device::resident_clusters.
struct ClusterKernel {
  const void* function;
  int threads;
  int64_t shared_bytes;
};
ClusterKernel cluster_kernel();

}  // namespace bhyt::cuda
