// Which library registers the ops: the first of a process. A copy of it that is loaded later registers none.
#pragma once

#include <ATen/core/Dict.h>

#include <string>

namespace bhyt {

// Whether this library registers the ops. Each registration asks first, since an exception in a registration would end
// the process: dlopen cannot pass it on.
bool registers_ops();

// What this library was built for and what it chose; also the op build_info.
c10::Dict<std::string, std::string> build_info();

}  // namespace bhyt
