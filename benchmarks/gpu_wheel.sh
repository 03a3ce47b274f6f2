#!/usr/bin/env bash
# A wheel for run_gpu.sh, built where there are a CUDA toolkit and minutes to spare; no GPU is needed:
#
#     benchmarks/gpu_wheel.sh FOLDER [COMMIT]
#
# Of the tree as it lies here, or of COMMIT, for what the GPU's machine has: TORCH (2.11), ARCHS ("90"). A CPU build of
# that torch is enough: the kernels know no torch, and the CUDA runtime is linked in. It comes from TORCH_INDEX, into an
# environment that is thrown away; or PYTHON has it. The wheel is installed there, and `python -m bhyt` tries its CPU
# kernels and says what its CUDA kernels were compiled for.
set -euo pipefail
FOLDER=$(mkdir -p "${1:?usage: gpu_wheel.sh FOLDER [COMMIT]}" && cd "$1" && pwd)
COMMIT=${2:-}
TORCH=${TORCH:-2.11}
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON=$work/venv/bin/python
  "$PYTHON" -m pip install -q "torch==$TORCH.*" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
  "$PYTHON" -m pip install -q setuptools wheel ninja numpy
fi
has=$("$PYTHON" -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))')
if [ "$has" != "$TORCH" ]; then
  echo "gpu_wheel.sh: $PYTHON has torch $has, TORCH is $TORCH" >&2
  exit 1
fi
source=$PWD
if [ -n "$COMMIT" ]; then
  source=$work/source
  mkdir "$source"
  git archive "$COMMIT" | tar -x -C "$source"
fi
export BHYT_CUDA=1 BHYT_CUDA_ARCHS=${ARCHS:-90}
"$PYTHON" -m pip wheel -q --no-build-isolation --no-deps -w "$work/dist" "$source"
"$PYTHON" -m pip install -q --no-deps --target "$work/tried" "$work"/dist/*.whl
(cd "$work" && PYTHONPATH=$work/tried "$PYTHON" -m bhyt)
mv "$work"/dist/*.whl "$FOLDER/"
ls -l "$FOLDER"/*.whl
