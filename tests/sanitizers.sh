#!/usr/bin/env bash
# The CPU kernels and the op library under sanitizers: the first report ends the script.
#
#   tests/sanitizers.sh [address] [undefined] [thread] [fuzz] [library]     some of these, or all
#
#   address, undefined, thread    cpp/fuzz_rows.cpp on random bytes under the sanitizer of that name; address looks for
#                                 leaks too, thread stands in for OpenMP, whose barriers ThreadSanitizer does not see
#   fuzz                          the same under libFuzzer with AddressSanitizer: CLANG names clang++ 19 or newer
#   library                       the op library with AddressSanitizer and UndefinedBehaviorSanitizer under the op-level
#                                 tests; the interpreter's leaks are not looked at
#
# Each program runs for FUZZ_SECONDS (60), built with FUZZ_CXXFLAGS added last. All works in OUT (build/sanitizers).
# test_sanitizers.py runs the first for a few seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-$PWD/build/sanitizers}
seconds=${FUZZ_SECONDS:-60}
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

# program NAME COMPILER OPTIONS..: cpp/fuzz_rows.cpp with the kernels, as $out/NAME
program() {
  local name=$1 compiler=$2 source objects=()
  shift 2
  mkdir -p "$out/objects-$name"
  for source in tests/cpp/fuzz_rows.cpp csrc/cpu/kernels*.cpp; do
    objects+=("$out/objects-$name/$(basename "$source" .cpp).o")
    "$compiler" -std=c++20 -O1 -g1 -ffp-contract=off -fno-math-errno -fno-trapping-math -w -Wno-psabi -Icsrc "$@" \
      ${FUZZ_CXXFLAGS:-} -c "$source" -o "${objects[-1]}"
  done
  "$compiler" "$@" "${objects[@]}" -o "$out/$name" -pthread
}

random_bytes() {
  local sanitizer=$1
  shift
  program "$sanitizer" g++ "-fsanitize=$sanitizer" "-DBHYT_FUZZ_SECONDS=$seconds" "$@"
  "$out/$sanitizer"
}

fuzz() {
  program fuzz "${CLANG:-clang++}" -fsanitize=fuzzer,address -O0
  mkdir -p "$out/corpus"
  "$out/fuzz" -max_total_time="$seconds" -max_len=256 -timeout=60 -artifact_prefix="$out/" "$out/corpus"
}

# Without vptr, which asks for type information that torch does not export.
library() {
  local flags="-O0 -g1 -fsanitize=address,undefined -fno-sanitize=vptr" tests=()
  BHYT_CUDA=0 BHYT_CXXFLAGS=$flags python setup.py -q build_ext --build-temp "$out/library" --build-lib "$out/library"
  cp -r bhyt/*.py "$out/library/bhyt"
  rm -rf "$out/library/tests"
  cp -r tests pyproject.toml "$out/library"
  for name in accuracy autograd determinism dtypes errors layouts nonfinite opcheck; do
    tests+=("tests/test_$name.py")
  done
  cd "$out/library"
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    python -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}"
}

for run in "${@:-address undefined thread fuzz library}"; do
  for name in $run; do
    case $name in
      address | thread) (random_bytes "$name") ;;
      undefined) (random_bytes "$name" -O0) ;;  # its checks take minutes to compile when optimised
      fuzz | library) ("$name") ;;
      *) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
  done
done
