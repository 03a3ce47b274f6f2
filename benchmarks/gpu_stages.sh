# shellcheck shell=bash
# The stages of run_gpu.sh, as functions that it exports. A stage knows when it must end: STAGE_END.

only_there() { if [ -n "$DRY" ]; then echo "dry run, not run: $*"; else "$@"; fi; }

seconds_left() { if [ -n "$DRY" ]; then echo 4; else echo $((STAGE_END - $(date +%s) - $1)); fi; }

device_facts() {
  only_there nvidia-smi
  only_there nvidia-smi --query-gpu=clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw --format=csv
  only_there "$PYTHON" -c '
import torch
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))'
}

install() {
  [ -n "$WHEEL" ] || { echo "no WHEEL: what the first command built stays"; return; }
  only_there "$PYTHON" -m pip install --no-deps --no-index --force-reinstall "$WHEEL"
}

build() {
  # The architecture at hand is enough here; CI compiles them all.
  BHYT_CUDA_ARCHS=$(only_there "$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export BHYT_CUDA_ARCHS BHYT_CUDA=1 MAX_JOBS=16
  only_there "$PYTHON" -m pip install --no-build-isolation --no-deps --verbose .
}

quick_check() {  # the kernels are there, and right in 36 outputs and gradients; what device they see
  only_there "$PYTHON" -P - << 'PY' || return
import bhyt, torch
forwards = ("forward", "forward_approx", "add_forward", "add_forward_approx")
for op in (*forwards, *(f"{name}_quantized" for name in forwards), "backward", "backward_approx"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bhyt::{op}", "CUDA"), op
print(torch.ops.bhyt.cuda_code(0))
PY
  only_there "$PYTHON" -P -m bhyt
}

experiments() {
  "$PYTHON" benchmarks/bench_backward.py --seconds "$(seconds_left 12)" --out "$OUT/experiments.json" ${DRY:+--dry}
}

profile() {  # E4: both kernels of the backward, once warm
  only_there ncu --kernel-name 'regex:backward_rows_persistent|sum_partials' --launch-skip 4 --launch-count 2 \
    --section SpeedOfLight --section WarpStateStats --section MemoryWorkloadAnalysis --section LaunchStats \
    "$PYTHON" benchmarks/bench_backward.py --calls 4
}

# What the stage's time allows, less that of starting and of the last problem.
benchmark() {
  "$PYTHON" benchmarks/bench_cuda.py --seconds "$(seconds_left 12)" --out "$OUT/cuda.json" --resume --parts "$1" \
    ${DRY:+--dry}
}

benchmark_peers() {
  if [ -n "$PEERS" ]; then
    local site=$WORK/peers path=$WORK/peers folder
    "$PYTHON" -m tarfile -e "$PEERS" "$site" || return
    # Python reads .pth files of its own folders alone.
    for folder in $(cat "$site"/*.pth 2> /dev/null); do path+=":$site/$folder"; done
    export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} FLASHINFER_WORKSPACE_BASE=$site
  fi
  benchmark peers
}

variants() {
  [ -n "$VARIANTS" ] || { echo "no VARIANTS: nothing to compare"; return; }
  local variant wheel arguments=()
  for variant in $VARIANTS; do
    wheel=${variant#*=}
    "$PYTHON" -m zipfile -e "${wheel%@*}" "$WORK/${variant%%=*}" || return
    case $wheel in *@*) variant=${variant%%=*}@${wheel##*@} ;; *) variant=${variant%%=*} ;; esac
    arguments+=(--variant "${variant%@*}=$WORK/$variant")
  done
  "$PYTHON" benchmarks/bench_variants.py "${arguments[@]}" --seconds "$(seconds_left 20)" --out "$OUT/variants.json" \
    ${DRY:+--dry}
}

pytest() {  # -P: the installed package, not the folder that lies here
  local parallel=()
  only_there "$PYTHON" -c 'import xdist' > /dev/null 2>&1 && parallel=(-n 4)
  only_there "$PYTHON" -P -m pytest -q "${parallel[@]}" "$@" tests
}

sanitize() {  # both tools beside each other
  # Without the caching allocator an access beyond a tensor leaves its allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local status=0 checked=(--error-exitcode 1 "$PYTHON" benchmarks/gpu_small_matrix.py)
  only_there compute-sanitizer --tool racecheck "${checked[@]}" > "$WORK/logs-$CALL/racecheck.log" 2>&1 &
  only_there compute-sanitizer --tool memcheck "${checked[@]}" || status=1
  wait $! || status=1
  return "$status"
}

export -f only_there seconds_left device_facts install build quick_check experiments profile benchmark benchmark_peers \
  variants pytest sanitize
