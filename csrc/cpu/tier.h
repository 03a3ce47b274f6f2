// The headers that the kernels of every instruction set need. kernels_*.cpp include this before their target pragma: a
// std:: template first used under the pragma would be compiled to, say, AVX-512 code, and the linker could keep that
// copy for callers of the baseline. test_isa.py looks for such code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "scalar.h"
#include "wanted.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
