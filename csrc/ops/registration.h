// Which library registers the ops: the first of a process. A copy of it that is loaded later registers none.
#pragma once

#include <ATen/core/Dict.h>

#include <string>

namespace bhyt {

// Asked before each registration, since an exception there would end the process: dlopen cannot pass it on.
bool registers_ops();

// What this library was built for and what it chose: the op of this name.
c10::Dict<std::string, std::string> build_info();

}  // namespace bhyt
