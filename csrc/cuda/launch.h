// The CUDA kernels as their binding sees them; the calls go to the CUDA stream `on`. No torch headers.
#pragma once

#include <cstring>

#include "../params.h"
#include "device.h"

namespace bhyt::cuda {

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t on);
cudaError_t forward_quantized(const ForwardParams& p, const Device& device, cudaStream_t on);

// Ways through a backward, which no GPU has compared yet. Results are the same, bit for bit, and so is the workspace. A
// call that one does not suit takes the first.
enum class BackwardVariant {
  two_launches,  // one for the rows, one for the sums of their partial sums
  one_launch,    // the rows' blocks add the partial sums: backward_one_launch.cuh
  ring,          // rows that clusters share come through a ring in shared memory: backward_ring.cuh
};
constexpr const char* kBackwardVariants[] = {"two_launches", "one_launch", "ring"};

// By name; no name, or an empty one, is the first's. False if there is none of that name.
inline bool find_variant(const char* name, BackwardVariant* variant) {
  *variant = BackwardVariant::two_launches;
  if (name == nullptr || *name == 0) return true;
  int number = 0;
  for (const char* const known : kBackwardVariants) {
    if (std::strcmp(name, known) == 0) {
      *variant = static_cast<BackwardVariant>(number);
      return true;
    }
    ++number;
  }
  return false;
}

// `workspace`: backward_workspace(p, device) bytes of scratch, aligned to 16.
int64_t backward_workspace(const BackwardParams& p, const Device& device);
cudaError_t backward(const BackwardParams& p, void* workspace, const Device& device, cudaStream_t on,
                     BackwardVariant variant = BackwardVariant::two_launches);

// The kernel that takes most of a multiprocessor. As many clusters of it as run at once are Device::resident_clusters.
struct ClusterKernel {
  const void* function;
  int threads;
  int64_t shared_bytes;
};
ClusterKernel cluster_kernel();

}  // namespace bhyt::cuda
