#include "launch.h"

#include <algorithm>

#define BHYT_TEXT(...) #__VA_ARGS__
#define BHYT_EXPANDED_TEXT(...) BHYT_TEXT(__VA_ARGS__)

namespace bhyt::cuda {

std::string archs() {
  std::string names;
#ifdef __CUDA_ARCH_LIST__  // "800,900,1000": nvcc's own record of what it was asked for
  const std::string list = BHYT_EXPANDED_TEXT(__CUDA_ARCH_LIST__);
  for (size_t from = 0; from < list.size();) {
    const size_t to = std::min(list.find(',', from), list.size());
    if (!names.empty()) names += ' ';
    names += "sm_" + list.substr(from, to - from - 1);
    from = to + 1;
  }
#endif
  return names;
}

}  // namespace bhyt::cuda
