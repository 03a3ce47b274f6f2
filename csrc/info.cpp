// What this library was built for and what it chose, for bug reports: `python -m bhyt`.
#include <ATen/Version.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "cpu/kernels.h"
#ifdef BHYT_CUDA
#include "cuda/launch.h"
#endif

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // begins with the name
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// torch: the version of the headers; compiler; cpu_tiers: those this CPU runs; cpu_tier: the one in use; cuda_archs: of
// the machine code within, empty for a build without CUDA.
c10::Dict<std::string, std::string> build_info() {
  c10::Dict<std::string, std::string> info;
  info.insert("torch", TORCH_VERSION);
  info.insert("compiler", kCompiler);
  std::string tiers;
  for (const auto* table : bhyt::cpu::runnable_kernels()) tiers += (tiers.empty() ? "" : " ") + std::string(table->name);
  info.insert("cpu_tiers", tiers);
  info.insert("cpu_tier", bhyt::cpu::kernels_for(at::get_cpu_capability().c_str()).name);
#ifdef BHYT_CUDA
  info.insert("cuda_archs", bhyt::cuda::archs());
#else
  info.insert("cuda_archs", "");
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bhyt, m) { m.def("build_info() -> Dict(str, str)", build_info); }
