// What bhyt_cuda.cpp calls. No torch here or below.
#pragma once

#include "../params.h"
#include "device.h"

namespace bhyt::cuda {

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t stream);
cudaError_t forward_quantized(const ForwardParams& p, const Device& device, cudaStream_t stream);

// `workspace`: backward_workspace(p, device) bytes of scratch, aligned to 16.
int64_t backward_workspace(const BackwardParams& p, const Device& device);
cudaError_t backward(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t stream);

// The kernel that asks for most of a multiprocessor: the clusters of it that run at once are resident_clusters.
struct ClusterKernel {
  const void* function;
  int threads;
  int64_t shared_bytes;
};
ClusterKernel cluster_kernel();

}  // namespace bhyt::cuda
