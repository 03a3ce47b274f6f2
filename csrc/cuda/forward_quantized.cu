#include "forward_launch.cuh"

namespace bhyt::cuda {

cudaError_t forward_quantized(const ForwardParams& p, const Device& device, cudaStream_t on) {
  return launch_forward<Byte>(p, device, on);
}

}  // namespace bhyt::cuda
