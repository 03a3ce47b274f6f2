// What this library was built for and what it chose, for bug reports: `python -m bhyt`.
#include <ATen/Version.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "cpu/kernels.h"
#include "registration.h"
#ifdef BHYT_CUDA
#include "cuda/device.h"
#endif

namespace bhyt {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // begins with the name
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

}  // namespace

// version: of bhyt; torch: of its headers; compiler; cpu_tiers: those this CPU runs; cpu_tier: the one in use;
// cuda_archs: of the machine code within; cuda_runtime: the version linked in; cuda_driver: the newest one that the
// driver supports, or "none"; cuda_problem: why the two differ. A build without CUDA has cuda_archs alone, empty.
c10::Dict<std::string, std::string> build_info() {
  c10::Dict<std::string, std::string> info;
  info.insert("version", C10_STRINGIZE(BHYT_VERSION));
  info.insert("torch", TORCH_VERSION);
  info.insert("compiler", kCompiler);
  std::string tiers;
  for (const auto* table : cpu::runnable_kernels()) tiers += (tiers.empty() ? "" : " ") + std::string(table->name);
  info.insert("cpu_tiers", tiers);
  info.insert("cpu_tier", cpu::kernels_for(at::get_cpu_capability().c_str()).name);
#ifdef BHYT_CUDA
  const cuda::Versions versions = cuda::versions();
  info.insert("cuda_archs", cuda::archs());
  info.insert("cuda_runtime", cuda::version_text(versions.runtime));
  info.insert("cuda_driver", cuda::version_text(versions.driver));
  info.insert("cuda_problem", cuda::driver_problem(versions));
#else
  info.insert("cuda_archs", "");
#endif
  return info;
}

TORCH_LIBRARY_FRAGMENT(bhyt, m) {
  if (!registers_ops()) return;
  m.def("build_info() -> Dict(str, str)", build_info);
}

}  // namespace bhyt
