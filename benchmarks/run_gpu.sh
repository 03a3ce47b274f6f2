#!/usr/bin/env bash
# One command on a machine with a GPU: build, test, sanitize, benchmark. Results, logs and stages.json go to OUTDIR.
#
#     benchmarks/run_gpu.sh OUTDIR
#     PEERS=peers.tar.xz benchmarks/run_gpu.sh OUTDIR      with the packages that gpu_peers.sh packed
#
# Ends within LIMIT seconds, 530 unless set. Stages come in order of worth, and none takes more than the seconds beside
# it, or than what is left: one that fails or runs out of time is recorded and the next one runs. The benchmarks write
# after each problem and carry on in the same file. The exit status is the number of failed stages. PYTHON is the
# interpreter.
set -u
OUT=$(mkdir -p "${1:?usage: run_gpu.sh OUTDIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530}
END=$(($(date +%s) + LIMIT))
failed=0
export OUT PYTHON
if ! nvidia-smi > /dev/null 2>&1; then
  echo "run_gpu.sh: no NVIDIA GPU here" >&2
  exit 100
fi
: > "$OUT/stages.txt"
commit=$(git rev-parse HEAD 2> /dev/null)

record() {  # name, status, seconds: a line, and all of them as JSON
  printf '%s\t%s\t%s\n' "$@" | tee -a "$OUT/stages.txt"
  awk -F '\t' -v commit="$commit" '
    BEGIN { printf "{\"commit\": \"%s\", \"stages\": [", commit }
    { printf "%s\n {\"stage\": \"%s\", \"status\": \"%s\", \"seconds\": %d}", (NR > 1 ? "," : ""), $1, $2, $3 }
    END { print "\n]}" }' "$OUT/stages.txt" > "$OUT/stages.json"
}

stage() {  # name, seconds, command...
  local name=$1 seconds=$2 began left status
  shift 2
  began=$(date +%s)
  left=$((END - began))
  [ "$left" -lt "$seconds" ] && seconds=$left
  if [ "$seconds" -le 5 ]; then
    status="not run: no time left"
    failed=$((failed + 1))
  else
    STAGE_END=$((began + seconds)) timeout --kill-after=5 "$seconds" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    case $status in
      0) status=passed ;;
      124 | 137) status="stopped after $seconds s"; failed=$((failed + 1)) ;;
      *) status="failed ($status)"; failed=$((failed + 1)) ;;
    esac
  fi
  record "$name" "$status" "$(($(date +%s) - began))"
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

quick_check() {  # the kernels are there, and right in 36 outputs and gradients
  "$PYTHON" -P - << 'PY' || return
import bhyt, torch
forwards = ("forward", "forward_approx", "add_forward", "add_forward_approx")
for op in (*forwards, *(f"{name}_quantized" for name in forwards), "backward", "backward_approx"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bhyt::{op}", "CUDA"), op
PY
  "$PYTHON" -P -m bhyt
}

sanitize() {  # both tools beside each other, the log of the second behind the first's
  # Without the caching allocator an access beyond a tensor leaves its allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local status=0
  local checked=(--error-exitcode 1 "$PYTHON" benchmarks/gpu_small_matrix.py)
  compute-sanitizer --tool racecheck "${checked[@]}" > "$OUT/racecheck.log" 2>&1 &
  compute-sanitizer --tool memcheck "${checked[@]}" || status=1
  wait $! || status=1
  cat "$OUT/racecheck.log" && rm "$OUT/racecheck.log"
  return "$status"
}

# What the stage's time allows, less that of starting and of the last problem.
benchmark() {
  local seconds=$((STAGE_END - $(date +%s) - 15))
  "$PYTHON" benchmarks/bench_cuda.py --seconds "$seconds" --out "$OUT/cuda.json" --resume --parts "$1"
}

benchmark_peers() {
  if [ -n "${PEERS:-}" ]; then
    local site=$OUT/.peers path=$OUT/.peers folder
    "$PYTHON" -m tarfile -e "$PEERS" "$site" || return
    # Python reads .pth files of its own folders alone.
    for folder in $(cat "$site"/*.pth 2> /dev/null); do path+=":$site/$folder"; done
    export PYTHONPATH=$path FLASHINFER_WORKSPACE_BASE=$site
  fi
  benchmark peers
  local status=$?
  rm -rf "$OUT/.peers"
  return "$status"
}

export -f device_facts build quick_check sanitize benchmark benchmark_peers

parallel=""
"$PYTHON" -c 'import xdist' 2> /dev/null && parallel="-n 4"
rm -f "$OUT/cuda.json"
stage device 30 bash -c device_facts
stage build 180 bash -c build
stage check 40 bash -c quick_check
stage goals 75 bash -c "benchmark goals,decode,quantized"
# -P: the installed package, not the folder that lies here.
# shellcheck disable=SC2086
stage tests 120 "$PYTHON" -P -m pytest -q -m "not slow" -k "cuda and not host" $parallel tests
stage peers 100 bash -c benchmark_peers
stage sanitizers 60 bash -c sanitize
stage tests_slow 45 "$PYTHON" -P -m pytest -q -m slow -k "cuda and not host" tests
stage compile 60 "$PYTHON" benchmarks/bench_compile.py --device cuda --dtypes bf16 --dim 2048 --heads 16 --kv-heads 4 \
  --length 2048 --seconds 3 --out "$OUT/compile.json"
# All variants, compiled ones too, take longer than all of this: by hand, without --modes and --providers.
"$PYTHON" -c 'import transformers' 2> /dev/null &&
  stage model 70 "$PYTHON" benchmarks/bench_model.py --device cuda --preset 374m --modes eager --seconds 5 \
    --providers "BHyT exact;BHyT" --out "$OUT/model.json"
stage more 120 bash -c "benchmark compiled,more"
exit "$failed"
