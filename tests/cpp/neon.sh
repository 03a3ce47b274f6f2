#!/usr/bin/env bash
# The NEON rows, built by a cross compiler and run under qemu-user: random calls through fuzz_rows.cpp, then some
# floats through tanh_sweep.cpp. Needs aarch64-linux-gnu-g++ (or CXX) and qemu-aarch64.
#
#   tests/cpp/neon.sh [SECONDS [STRIDE]]      60 s and every 100,003rd float; works in OUT (build/neon); FUZZ_CXXFLAGS
# last
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-$PWD/build/neon}
compiler=${CXX:-aarch64-linux-gnu-g++}
mkdir -p "$out"

objects=()
for source in csrc/cpu/kernels{,_baseline,_neon}.cpp tests/cpp/{fuzz_rows,tanh_sweep}.cpp; do
  object="$out/$(basename "$source" .cpp).o"
  $compiler -std=c++20 -O1 -ffp-contract=off -fno-math-errno -fno-trapping-math -w -Icsrc \
    "-DBHYT_FUZZ_SECONDS=${1:-60}" ${FUZZ_CXXFLAGS:-} -c "$source" -o "$object"
  [[ $source == csrc/* ]] && objects+=("$object")
done
for main in fuzz_rows tanh_sweep; do
  $compiler -static "$out/$main.o" "${objects[@]}" -o "$out/$main" -pthread
done
qemu-aarch64 "$out/fuzz_rows"
qemu-aarch64 "$out/tanh_sweep" "${2:-100003}"
