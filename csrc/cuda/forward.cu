#include "forward_kernels.cuh"

namespace bhyt::cuda {

cudaError_t forward(const ForwardParams& p, const Device& device, cudaStream_t on) {
  return run_forward<void>(p, device, on);
}

}  // namespace bhyt::cuda
