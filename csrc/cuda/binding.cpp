// The CUDA key of the ops: device guard, current stream, workspace, errors. Checks and allocation are ops/device.h's.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <cstdlib>
#include <string>

#include "../ops/device.h"
#include "launch.h"

// torch before 2.11 has no Stream::native_handle. Newer torch is asked through c10 alone, so that this builds and links
// with a CPU build of torch too.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 11
#include <c10/cuda/CUDAStream.h>
#define BHYT_STREAM_OF(device) c10::cuda::getCurrentCUDAStream((device).index()).stream()
#else
#define BHYT_STREAM_OF(device) \
  static_cast<cudaStream_t>(c10::impl::VirtualGuardImpl((device).type()).getStream(device).native_handle())
#endif

namespace bhyt {
namespace {

void check(cudaError_t error, int index) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaDeviceProp properties;
    const bool known = cudaGetDeviceProperties(&properties, index) == cudaSuccess;
    TORCH_CHECK(false, "bhyt: no kernels for device cuda:", index, " (", known ? properties.name : "unknown",
                ", compute capability ", known ? properties.major : 0, ".", known ? properties.minor : 0,
                "): this build has ", cuda::archs(), "; build bhyt from source for it");
  }
  std::string problem;
  if (error == cudaErrorInsufficientDriver) problem = cuda::driver_problem(cuda::versions());
  if (error == cudaErrorUnsupportedPtxVersion) problem = cuda::ptx_problem(cuda::versions());
  if (problem.empty()) problem = cudaGetErrorString(error);
  TORCH_CHECK(false, "bhyt: device cuda:", index, ": ", problem);
}

// This library has a CUDA runtime of its own beside torch's. Both follow the thread's current device, which torch's
// guard sets; this makes sure of it.
void make_current(int index) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == index) return;
  check(cudaSetDevice(index), index);
}

// Makes the device current. The driver is asked about it once.
const cuda::Device& use_device(const c10::Device& wanted) {
  constexpr int kMost = 64;
  static std::array<cuda::Description, kMost> descriptions;
  const int index = wanted.index();
  TORCH_CHECK(index >= 0 && index < kMost, "bhyt: x: expected device cuda:0 .. cuda:", kMost - 1, ", got ", wanted);
  make_current(index);
  const cuda::Device* device = nullptr;
  check(descriptions[index].get([&](cuda::Device* found) { return cuda::describe(index, found); }, &device), index);
  return *device;
}

void run_forward(const ForwardParams& p, const Tensor& x) {
  const c10::DeviceGuard guard(x.device());
  const cuda::Device& device = use_device(x.device());
  const auto run = p.quantization ? cuda::forward_quantized : cuda::forward;
  check(run(p, device, BHYT_STREAM_OF(x.device())), device.index);
}

// BHYT_CUDA_BACKWARD, read once: a process keeps to one variant.
cuda::BackwardVariant backward_variant() {
  static const cuda::BackwardVariant variant = [] {
    const char* const name = std::getenv("BHYT_CUDA_BACKWARD");
    cuda::BackwardVariant found;
    if (cuda::find_variant(name, &found)) return found;
    std::string known;
    for (const char* const each : cuda::kBackwardVariants) known += (known.empty() ? "" : ", ") + std::string(each);
    TORCH_CHECK(false, "bhyt: BHYT_CUDA_BACKWARD: expected one of ", known, ", got ", name);
  }();
  return variant;
}

void run_backward(const BackwardParams& p, const Tensor& x) {
  const c10::DeviceGuard guard(x.device());
  const cuda::Device& device = use_device(x.device());
  const int64_t bytes = cuda::backward_workspace(p, device);
  const Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte));
  check(cuda::backward(p, workspace.mutable_data_ptr(), device, BHYT_STREAM_OF(x.device()), backward_variant()),
        device.index);
}

// What the kernels on this device were compiled for, and the clusters that it runs at once.
std::string cuda_code(int64_t index) {
  const c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
  const c10::DeviceGuard guard(device);
  return cuda::text(use_device(device));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bhyt, m) {
  if (!registers_ops()) return;
  m.def("cuda_code(int device) -> str", cuda_code);
  m.def("cuda_backward() -> str", [] { return std::string(cuda::kBackwardVariants[int(backward_variant())]); });
}

TORCH_LIBRARY_IMPL(bhyt, CUDA, m) { register_ops<DeviceOps<run_forward, run_backward>>(m); }

}  // namespace bhyt
