#!/usr/bin/env bash
# The CPU kernels and the op library under sanitizers: the first report ends the script.
#
#   tests/cpp/sanitizers.sh [address] [undefined] [thread] [fuzz] [library]     some of these, or all
#
#   address, undefined, thread    fuzz_rows.cpp on random bytes under the sanitizer of that name, then some floats
#                                 through tanh_sweep.cpp; address looks for leaks too, thread stands in for OpenMP,
#                                 whose barriers ThreadSanitizer does not see
#   fuzz                          the same under libFuzzer with AddressSanitizer: CLANG names clang++ 19 or newer
#   library                       the op library with AddressSanitizer and UndefinedBehaviorSanitizer under the op-level
#                                 tests, once per CPU tier; the interpreter's leaks are not looked at
#
# Each fuzzer runs for FUZZ_SECONDS (60), built with FUZZ_CXXFLAGS added last. All works in OUT (build/sanitizers).
# test_sanitizers.py runs the first for a few seconds.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-$PWD/build/sanitizers}
seconds=${FUZZ_SECONDS:-60}
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

# build NAME MAINS COMPILER OPTIONS..: each tests/cpp/MAIN.cpp with the kernels, as $out/NAME/MAIN
build() {
  local name=$1 mains=$2 compiler=$3 main source object kernels=()
  shift 3
  mkdir -p "$out/$name"
  for source in csrc/cpu/kernels*.cpp $(printf 'tests/cpp/%s.cpp ' $mains); do
    object="$out/$name/$(basename "$source" .cpp).o"
    "$compiler" -std=c++20 -O1 -g1 -ffp-contract=off -fno-math-errno -fno-trapping-math -w -Wno-psabi -Icsrc "$@" \
      ${FUZZ_CXXFLAGS:-} -c "$source" -o "$object"
    [[ $source == csrc/* ]] && kernels+=("$object")
  done
  for main in $mains; do
    "$compiler" "$@" "$out/$name/$main.o" "${kernels[@]}" -o "$out/$name/$main" -pthread
  done
}

random_bytes() {
  local sanitizer=$1
  shift
  build "$sanitizer" "fuzz_rows tanh_sweep" g++ "-fsanitize=$sanitizer" "-DBHYT_FUZZ_SECONDS=$seconds" "$@"
  "$out/$sanitizer/fuzz_rows"
  "$out/$sanitizer/tanh_sweep" 100003
}

fuzz() {
  build fuzz fuzz_rows "${CLANG:-clang++}" -fsanitize=fuzzer,address -O0
  mkdir -p "$out/corpus"
  "$out/fuzz/fuzz_rows" -max_total_time="$seconds" -max_len=256 -timeout=60 -artifact_prefix="$out/" "$out/corpus"
}

# Without vptr, which asks for type information that torch does not export; -fwrapv, which Python builds with, would
# allow signed overflow.
library() {
  local flags="-O0 -g1 -fno-wrapv -fsanitize=address,undefined -fno-sanitize=vptr" tests=()
  BHYT_CUDA=0 BHYT_CXXFLAGS=$flags python setup.py -q build_ext --build-temp "$out/library" --build-lib "$out/library"
  cp -r bhyt/*.py "$out/library/bhyt"
  rm -rf "$out/library/tests"
  cp -r tests pyproject.toml "$out/library"
  for name in accuracy autograd determinism dtypes errors layouts nonfinite opcheck quantized quantized_calls; do
    tests+=("tests/ops/test_$name.py")
  done
  cd "$out/library"
  export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0
  for tier in "" ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default; do
    env $tier python -m pytest -q --capture=sys -p no:cacheprovider -m "not slow" "${tests[@]}"
  done
}

for run in "${@:-address undefined thread fuzz library}"; do
  for name in $run; do
    case $name in
      address | thread) (random_bytes "$name") ;;
      undefined) (random_bytes "$name" -O0) ;;  # its checks take minutes to compile when optimised
      fuzz | library) ("$name") ;;
      *) sed -n '2,14s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
  done
done
