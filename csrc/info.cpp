// What this library was built for and what it chose, for bug reports: `python -m bhyt`.
#include <ATen/Version.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "cpu/kernels.h"
#ifdef BHYT_CUDA
#include "cuda/device.h"
#endif

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // begins with the name
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// torch: the version of the headers; compiler; cpu_tiers: those this CPU runs; cpu_tier: the one in use; cuda_archs: of
// the machine code within; cuda_runtime: the version linked in; cuda_driver: the newest one that the driver supports, or
// "none"; cuda_problem: why the two do not go together. A build without CUDA has cuda_archs alone, empty.
c10::Dict<std::string, std::string> build_info() {
  c10::Dict<std::string, std::string> info;
  info.insert("torch", TORCH_VERSION);
  info.insert("compiler", kCompiler);
  std::string tiers;
  for (const auto* table : bhyt::cpu::runnable_kernels()) tiers += (tiers.empty() ? "" : " ") + std::string(table->name);
  info.insert("cpu_tiers", tiers);
  info.insert("cpu_tier", bhyt::cpu::kernels_for(at::get_cpu_capability().c_str()).name);
#ifdef BHYT_CUDA
  const bhyt::cuda::Versions versions = bhyt::cuda::versions();
  info.insert("cuda_archs", bhyt::cuda::archs());
  info.insert("cuda_runtime", bhyt::cuda::version_text(versions.runtime));
  info.insert("cuda_driver", bhyt::cuda::version_text(versions.driver));
  info.insert("cuda_problem", bhyt::cuda::driver_problem(versions));
#else
  info.insert("cuda_archs", "");
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bhyt, m) { m.def("build_info() -> Dict(str, str)", build_info); }
