#!/usr/bin/env bash
# The peers of bench_cuda.py for a machine without network, as one file: on a machine with network
#
#     benchmarks/gpu_peers.sh peers.tar.xz
#
# and there PEERS=peers.tar.xz benchmarks/run_gpu.sh OUTDIR second. For Python 3.12 on x86-64, beside a torch with Triton
# and cuda-python, which are not packed. What else a peer needs comes with it, in versions that go together: PACKAGES
# names others, PYTHON_VERSION another Python. LIMIT_MB, 50, is what the file may have: a peer that makes it larger is
# left out, with a warning. Packing takes minutes.
set -euo pipefail
OUT=$(realpath -m "${1:?usage: gpu_peers.sh FILE.tar.xz}")
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
LIMIT_MB=${LIMIT_MB:-50}
# A line per peer, in order of worth. QuACK's compiler is most of it all: 4.3.5 is 58 MB, later ones 95.
PACKAGES=${PACKAGES:-"liger-kernel==0.8.5
apache-tvm-ffi==0.1.6 torch-c-dlpack-ext==0.1.4 nvidia-cutlass-dsl==4.3.5 quack-kernels==0.2.4
apache-tvm-ffi==0.1.6 flashinfer-python==0.6.1"}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
mkdir "$work/site"

size_mb() { du -sm "$1" | cut -f1; }

while read -r line; do
  [ -n "$line" ] || continue
  read -ra names <<< "$line"
  peer=${names[-1]}
  rm -rf "$work/more" && mkdir "$work/more"
  if ! "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
    --target "$work/more" --implementation cp --python-version "$PYTHON_VERSION" "${platforms[@]}" "${names[@]}"; then
    echo "gpu_peers.sh: WARNING: $peer is left out: pip did not find ${names[*]}" >&2
    continue
  fi
  cp -r "$work/site" "$work/both" && cp -r "$work/more/." "$work/both/"
  tar -C "$work/both" -c . | xz -T0 -6 > "$work/both.tar.xz"
  packed=$(size_mb "$work/both.tar.xz")
  if [ "$packed" -gt "$LIMIT_MB" ]; then
    echo "gpu_peers.sh: WARNING: $peer is left out: with it the file has $packed MB, LIMIT_MB is $LIMIT_MB" >&2
    rm -rf "$work/both"
    continue
  fi
  echo "$peer: $(size_mb "$work/more") MB, $packed MB packed with those before it"
  rm -rf "$work/site" && mv "$work/both" "$work/site"
  mkdir -p "$(dirname "$OUT")"
  mv "$work/both.tar.xz" "$OUT"
done <<< "$PACKAGES"
[ -f "$OUT" ] || { echo "gpu_peers.sh: no peer was found" >&2; exit 1; }
ls -l "$OUT"
