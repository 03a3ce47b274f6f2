// What the rows of every instruction set include. First in kernels_*.cpp, before their target pragma: a std:: template
// instantiated under the pragma would be emitted with, say, AVX-512 code and could be the copy the linker keeps for
// baseline callers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "scalar.h"
#include "wanted.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
