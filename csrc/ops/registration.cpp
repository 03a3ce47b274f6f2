#include "registration.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

namespace bhyt {
namespace {

std::string entry(const c10::Dict<std::string, std::string>& info, const char* key) {
  const auto found = info.find(key);
  return found == info.end() ? "unknown" : found->value();
}

// Two builds are the same when these texts are equal. CUDA code is part of the text: without it the ops run as
// formulas.
std::string build_of(const c10::Dict<std::string, std::string>& info) {
  const std::string archs = entry(info, "cuda_archs");
  return entry(info, "version") + " for torch " + entry(info, "torch") + (archs.empty() ? "" : " and CUDA " + archs);
}

// The build of the library that has registered the ops. It may be of any version.
std::string registered_build() {
  const auto op = c10::Dispatcher::singleton().findSchema({"bhyt::build_info", ""});
  if (!op || !op->schema().arguments().empty()) return "unknown";
  torch::jit::Stack results;
  op->callBoxed(&results);
  return build_of(c10::impl::toTypedDict<std::string, std::string>(results.at(0).toGenericDict()));
}

std::string path_of_this_library() {
  Dl_info found;
  return dladdr(reinterpret_cast<const void*>(&path_of_this_library), &found) ? found.dli_fname : "this library";
}

bool is_first() {
  if (!c10::Dispatcher::singleton().findSchema({"bhyt::forward", ""})) return true;
  const std::string theirs = registered_build(), ours = build_of(build_info());
  if (theirs != ours)
    TORCH_WARN("bhyt: ", path_of_this_library(), " is of version ", ours, ", but the ops are registered already, by",
               " version ", theirs, ": they stay, and this library does nothing");
  return false;
}

}  // namespace

bool registers_ops() {
  static const bool first = is_first();
  return first;
}

}  // namespace bhyt
