#include "forward_kernels.cuh"

namespace bhyt::cuda {

cudaError_t forward_quantized(const ForwardParams& p, const Device& device, cudaStream_t on) {
  return run_forward<Byte>(p, device, on);
}

}  // namespace bhyt::cuda
