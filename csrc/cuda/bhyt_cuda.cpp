// The CUDA key of the ops: device guard, current stream, workspace, errors. Checks and allocation are binding.h's.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <mutex>

#include "../binding.h"
#include "launch.h"

// Older than Stream::native_handle. Newer torch is asked through c10 alone: it builds, and links, without CUDA as well.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 11
#include <c10/cuda/CUDAStream.h>
#define BHYT_STREAM_OF(device) c10::cuda::getCurrentCUDAStream((device).index()).stream()
#else
#define BHYT_STREAM_OF(device) \
  static_cast<cudaStream_t>(c10::impl::VirtualGuardImpl((device).type()).getStream(device).native_handle())
#endif

namespace bhyt {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  TORCH_CHECK(error == cudaSuccess, "bhyt: device cuda:", device, ": ", cudaGetErrorString(error));
  return value;
}

// Asked of the driver once per device.
const cuda::Device& known_device(const Tensor& x) {
  constexpr int kMost = 64;
  static std::array<std::once_flag, kMost> asked;
  static std::array<cuda::Device, kMost> known;
  const int index = x.device().index();
  TORCH_CHECK(index >= 0 && index < kMost, "bhyt: x: expected device cuda:0 .. cuda:", kMost - 1, ", got ",
              x.device());
  std::call_once(asked[index], [index] {
    known[index] = {index, attribute(cudaDevAttrMultiProcessorCount, index),
                    attribute(cudaDevAttrComputeCapabilityMajor, index) >= 9};
  });
  return known[index];
}

void check_launch(cudaError_t error, const cuda::Device& device) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaDeviceProp properties;
    const bool known = cudaGetDeviceProperties(&properties, device.index) == cudaSuccess;
    TORCH_CHECK(false, "bhyt: no kernels for device cuda:", device.index, " (", known ? properties.name : "unknown",
                ", compute capability ", known ? properties.major : 0, ".", known ? properties.minor : 0,
                "): this build has ", cuda::archs(), "; build bhyt from source for it");
  }
  TORCH_CHECK(false, "bhyt: device cuda:", device.index, ": ", cudaGetErrorString(error));
}

// This library has a CUDA runtime of its own, beside torch's: both follow the thread's current device, which torch's
// guard sets; asking costs less than being wrong.
void make_current(const cuda::Device& device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == device.index) return;
  check_launch(cudaSetDevice(device.index), device);
}

void run_forward(const ForwardParams& p, const Tensor& x) {
  const c10::DeviceGuard guard(x.device());
  const cuda::Device& device = known_device(x);
  make_current(device);
  check_launch(cuda::forward(p, device, BHYT_STREAM_OF(x.device())), device);
}

void run_backward(const BackwardParams& p, const Tensor& x) {
  const c10::DeviceGuard guard(x.device());
  const cuda::Device& device = known_device(x);
  make_current(device);
  const int64_t bytes = cuda::backward_workspace(p, device);
  const Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte));
  check_launch(cuda::backward(p, workspace.mutable_data_ptr(), device, BHYT_STREAM_OF(x.device())), device);
}

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, CUDA, m) {
  using Ops = DeviceOps<run_forward, run_backward>;
  m.impl("forward", &Ops::forward);
  m.impl("forward_approx", &Ops::forward_approx);
  m.impl("add_forward", &Ops::add_forward);
  m.impl("add_forward_approx", &Ops::add_forward_approx);
  m.impl("backward", &Ops::backward);
  m.impl("backward_approx", &Ops::backward_approx);
}

}  // namespace bhyt
