// Which table of kernels a call gets.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <vector>

namespace bhyt::cpu {

bool fetches_next_row() {
#if defined(__x86_64__)
  static const bool is_intel = __builtin_cpu_is("intel");
  return is_intel;
#else
  return false;
#endif
}

std::vector<const Kernels*> runnable_kernels(DType stream) {
  std::vector<const Kernels*> tables = {&baseline::kernels};
  if (stream == DType::f64) return tables;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return tables;
  tables.push_back(&avx2::kernels);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return tables;
  tables.push_back(&avx512::kernels);
#elif defined(__aarch64__)
  tables.push_back(&neon::kernels);
#endif
  return tables;
}

const Kernels& kernels_for([[maybe_unused]] const char* capability, const std::vector<const Kernels*>& runnable) {
#if defined(__aarch64__)
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const size_t most = asked != nullptr && std::strcmp(asked, "default") == 0 ? 0 : 1;
#else
  const size_t most = std::strncmp(capability, "AVX512", 6) == 0 ? 2 : std::strncmp(capability, "AVX2", 4) == 0 ? 1 : 0;
#endif
  return *runnable[most < runnable.size() ? most : runnable.size() - 1];
}

}  // namespace bhyt::cpu
