// Which table of kernels a call gets, from what is asked for and what this CPU can run. The tables are stand-ins:
// linked with csrc/cpu/kernels.cpp alone.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace bhyt::cpu {
namespace baseline {
constinit const Kernels kernels = {"default"};
}
namespace avx2 {
constinit const Kernels kernels = {"avx2"};
}
namespace avx512 {
constinit const Kernels kernels = {"avx512"};
}
namespace neon {
constinit const Kernels kernels = {"neon"};
}
}  // namespace bhyt::cpu

using namespace bhyt::cpu;

int main() {
  int failures = 0;
  const auto check = [&](const Kernels& found, const char* wanted, const std::string& what) {
    if (std::strcmp(found.name, wanted) == 0) return;
    std::printf("%s: expected %s, got %s\n", what.c_str(), wanted, found.name);
    ++failures;
  };
  const std::vector<const Kernels*> all = {&baseline::kernels, &avx2::kernels, &avx512::kernels};
  const char* const capabilities[] = {"DEFAULT", "AVX2", "AVX512"};
  for (size_t asked = 0; asked < 3; ++asked)
    for (size_t has = 0; has < 3; ++has) {  // a CPU whose best is all[has]
      const std::vector<const Kernels*> runnable(all.begin(), all.begin() + has + 1);
      check(kernels_for(capabilities[asked], runnable), all[asked < has ? asked : has]->name,
            std::string(capabilities[asked]) + " on a CPU with " + all[has]->name);
    }
  check(kernels_for("AVX512_SOMETHING", all), "avx512", "a capability of a later torch");
  check(kernels_for("SVE256", all), "default", "another kind of CPU's");
  const auto here = runnable_kernels();
  check(kernels_for("AVX512", here), here.back()->name, "all that this CPU can run");
  check(kernels_for("AVX512", runnable_kernels(bhyt::DType::f64)), "default", "rows of float64");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
