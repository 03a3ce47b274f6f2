#include "forward_launch.cuh"

namespace bhyt::cuda {

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t on) {
  return launch_forward<void>(p, device, on);
}

}  // namespace bhyt::cuda
