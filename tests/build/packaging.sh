#!/usr/bin/env bash
# The ways to install, each tried for real: USERS rows 1 to 3. Run in a throwaway environment that has torch (its bhyt
# is replaced and removed), after an install from this folder, whose objects are reused: nothing is compiled anew.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
cd "$root"
work="$(mktemp -d)"
trap 'rm -rf "$work"; rm -f "$root"/bhyt/_ops*.so "$root"/bhyt/_built_for.py' EXIT
say() { printf '\n== %s\n' "$1"; }
asks_for_torch() { unzip -p "$1" '*/METADATA' | grep -qx "Requires-Dist: torch==$torch_minor.\*"; }
torch_version="$(python -c 'import torch; print(torch.__version__.split("+")[0])')"
torch_minor="${torch_version%.*}"

# The last of the ways below fetches torch, which takes longest: meanwhile, the others.
python -m venv "$work/bare"
echo "torch==$torch_version" > "$work/constraint"
mkdir "$work/source"
git archive HEAD | tar -x -C "$work/source"
(
  cd "$work/source"
  export PIP_CONSTRAINT="$work/constraint" PIP_BUILD_CONSTRAINT="$work/constraint"
  exec "$work/bare/bin/pip" install -q --dry-run --no-deps --report "$work/report" .
) &
without_torch=$!

say "torch is there, whatever PyPI's newest is: the wheel is built for it"
pip wheel -q --no-deps -w "$work/isolated" .
wheel="$(ls "$work"/isolated/bhyt-*-cp310-abi3-*.whl)"
unzip -l "$wheel" > "$work/listing"
grep -q 'bhyt/_ops.abi3.so' "$work/listing"
asks_for_torch "$wheel"
unzip -p "$wheel" bhyt/_built_for.py | grep -q "$torch_version"

say "without network and without build isolation"
pip install -q setuptools wheel ninja packaging
PIP_NO_INDEX=1 pip wheel -q --no-build-isolation --no-deps -w "$work/offline" .
ls "$work"/offline/bhyt-*-cp310-abi3-*.whl

say "editable"
PIP_NO_INDEX=1 pip install -q --no-build-isolation --no-deps -e .
(cd "$work" && python -c "import bhyt, sys; sys.exit(not bhyt.__file__.startswith('$root'))")
(cd "$work" && python -m bhyt)
pip uninstall -q -y bhyt
rm -f bhyt/_ops*.so bhyt/_built_for.py

say "the sdist is complete, and has neither research nor results"
python -c "from setuptools import build_meta; build_meta.build_sdist('$work/sdist')" > /dev/null
tar -tzf "$work"/sdist/bhyt-*.tar.gz | cut -d/ -f2- | sort > "$work/packed"
git ls-files -- csrc bhyt _build tests setup.py pyproject.toml CMakeLists.txt LICENSE README.md | sort > "$work/tracked"
if comm -13 "$work/packed" "$work/tracked" | grep .; then
  echo "missing in the sdist" && exit 1
fi
if grep -E '^research/|^benchmarks/results/' "$work/packed"; then
  echo "too much in the sdist" && exit 1
fi

say "no nvcc: a CPU build that says so; insisting is an error"
sed 's#"/usr/local/cuda"#"/nowhere"#' setup.py > "$work/setup.py"
nowhere=(env -u CUDA_HOME -u CUDA_PATH PATH="$(dirname "$(command -v python)"):/usr/bin:/bin")
for wanted in "" 1; do
  (cd "$work" && BHYT_CUDA="$wanted" "${nowhere[@]}" python -c "
import setuptools; setuptools.setup = lambda **kwargs: None
import setup") > "$work/log" 2>&1 && outcome=0 || outcome=$?
  cat "$work/log"
  if [ -n "$wanted" ]; then
    [ "$outcome" -ne 0 ] && grep -q "nvcc was not found: set CUDA_HOME" "$work/log"
  else
    [ "$outcome" -eq 0 ] && grep -q "building for the CPU only" "$work/log"
  fi
done

say "no torch: the build fetches it, and the package asks for its minor version"
wait "$without_torch"
python -c "
import json, sys
(package,) = json.load(open('$work/report'))['install']
sys.exit('torch==$torch_minor.*' not in package['metadata']['requires_dist'])"
say "packaging: all good"
