// A library that registers ops of bhyt of another version: 0.0.1, by the rules of registration.h. With OLD defined, one
// that says no version and knows no rules.
#include <torch/library.h>

#ifndef OLD
#include "ops/registration.cpp"

c10::Dict<std::string, std::string> bhyt::build_info() {
  c10::Dict<std::string, std::string> info;
  info.insert("version", "0.0.1");
  info.insert("torch", "2.7.0");
  info.insert("cuda_archs", "sm_90");
  return info;
}
#endif

TORCH_LIBRARY_FRAGMENT(bhyt, m) {
#ifndef OLD
  if (!bhyt::registers_ops()) return;
  m.def("build_info() -> Dict(str, str)", bhyt::build_info);
#endif
  m.def("forward(Tensor x) -> Tensor", [](const at::Tensor& x) { return x.clone(); });
}
