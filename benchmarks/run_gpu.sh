#!/usr/bin/env bash
# One command on a machine with a GPU: build, test, sanitize, benchmark. Results, logs and stages.json go to OUTDIR.
#
#     benchmarks/run_gpu.sh OUTDIR
#
# Made to end within 9 minutes on an H100. A stage that fails or runs out of its time is recorded and the next one runs;
# the exit status is the number of failed stages. LIMIT sets the seconds for all, PYTHON the interpreter.
set -u
OUT=$(mkdir -p "${1:?usage: run_gpu.sh OUTDIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530}
START=$SECONDS
failed=0
if ! nvidia-smi > /dev/null 2>&1; then
  echo "run_gpu.sh: no NVIDIA GPU here" >&2
  exit 100
fi
: > "$OUT/stages.txt"

stage() {  # name, seconds, command...
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS + START)) began=$SECONDS status
  shift 2
  [ "$left" -lt "$seconds" ] && seconds=$left
  if [ "$seconds" -le 5 ]; then
    status="not run: no time left"
    failed=$((failed + 1))
  else
    timeout --kill-after=5 "$seconds" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    case $status in
      0) status=passed ;;
      124 | 137) status="stopped after $seconds s"; failed=$((failed + 1)) ;;
      *) status="failed ($status)"; failed=$((failed + 1)) ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" | tee -a "$OUT/stages.txt"
  [ "$status" = passed ] || tail -n 5 "$OUT/$name.log" 2> /dev/null
}

device_facts() {
  nvidia-smi
  nvcc --version
  "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))'
}

build() {
  # The architecture at hand is enough here; CI compiles them all.
  BHYT_CUDA_ARCHS=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export BHYT_CUDA_ARCHS BHYT_CUDA=1 MAX_JOBS=8 NVCC_APPEND_FLAGS="--threads 4"
  "$PYTHON" -m pip install --no-build-isolation --no-deps --verbose .
}

kernels_are_registered() {
  "$PYTHON" -P - << 'PY'
import bhyt, torch
for op in ("forward", "forward_approx", "add_forward", "add_forward_approx", "backward", "backward_approx"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bhyt::{op}", "CUDA"), op
y, v = torch.ops.bhyt.forward(torch.randn(4, 64, device="cuda"), None, torch.ones(1, device="cuda"))
print(bhyt.__file__, y.isfinite().all().item(), v.flatten().tolist())
PY
}

sanitize() {
  # Without the caching allocator an access beyond a tensor leaves its allocation.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
    "$PYTHON" benchmarks/gpu_small_matrix.py
}
export -f device_facts build kernels_are_registered sanitize
export PYTHON

parallel=""
"$PYTHON" -c 'import xdist' 2> /dev/null && parallel="-n 4"
stage device 30 bash -c device_facts
stage build 200 bash -c build
stage registered 60 bash -c kernels_are_registered
# -P: the installed package, not the folder that lies here.
# shellcheck disable=SC2086
stage tests 150 "$PYTHON" -P -m pytest -q -m "not slow" -k "cuda and not host" $parallel tests
stage tests_slow 60 "$PYTHON" -P -m pytest -q -m slow -k "cuda and not host" tests
stage memcheck 60 bash -c "sanitize memcheck"
stage racecheck 60 bash -c "sanitize racecheck"
stage benchmarks 240 "$PYTHON" benchmarks/bench_cuda.py --out "$OUT/cuda.json"
stage compile 60 "$PYTHON" benchmarks/bench_compile.py --device cuda --dtypes bf16 --dim 2048 --heads 16 --kv-heads 4 \
  --length 2048 --seconds 5 --out "$OUT/compile.json"
# Compiling nine models of 16 layers takes longer than all of this: by hand, without --modes.
"$PYTHON" -c 'import transformers' 2> /dev/null &&
  stage model 90 "$PYTHON" benchmarks/bench_model.py --device cuda --preset 374m --modes eager --seconds 15 \
    --out "$OUT/model.json"

"$PYTHON" - "$OUT" << 'PY'
import json, subprocess, sys
from pathlib import Path
out = Path(sys.argv[1])
rows = [line.split("\t") for line in (out / "stages.txt").read_text().splitlines()]
git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
stages = [{"stage": name, "status": status, "seconds": int(seconds)} for name, status, seconds in rows]
(out / "stages.json").write_text(json.dumps({"commit": git.stdout.strip() or None, "stages": stages}, indent=1) + "\n")
PY
exit "$failed"
