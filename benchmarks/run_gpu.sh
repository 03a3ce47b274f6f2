#!/usr/bin/env bash
# Fifteen minutes of a GPU, in two commands, the second at once behind the first:
#
#     benchmarks/run_gpu.sh OUTDIR first      install, check, experiments, goals, tests: 420 s at most
#     benchmarks/run_gpu.sh OUTDIR second     variants, sanitizers, what only a GPU shows, peers: 300 s at most
#
# WHEEL=bhyt.whl                    the package, built elsewhere by gpu_wheel.sh; without it the first command builds
# VARIANTS="before=a.whl now=b.whl" builds to be timed beside each other; one=b.whl@one_launch: with that variant of the
#                                   backward
# PEERS=peers.tar.xz                the packages that gpu_peers.sh packed
# DRY=1                             tries it all without a GPU: few rows on the CPU, made-up times, no limits; what only
#                                   a GPU's machine can do is printed
#
# OUTDIR gets at most eight files in all: JSON, and the logs of each command packed. Stages come in order of worth, and
# none takes more than the seconds beside it, which add up to LIMIT, or than what is left: one that fails or runs out of
# time is recorded and the next one runs. Benchmarks write after each problem and replace their file at once; the last
# one takes up what the others left out. The exit status is the number of failed stages. PYTHON is the interpreter.
set -u
usage="usage: run_gpu.sh OUTDIR first|second"
CALL=${2:?$usage}
case $CALL in first) limit=420 ;; second) limit=300 ;; *) echo "$usage" >&2; exit 101 ;; esac
OUT=$(mkdir -p "${1:?$usage}" && cd "$1" && pwd)
for name in WHEEL PEERS; do [ -z "${!name:-}" ] || declare "$name=$(realpath "${!name}")"; done
builds=
for variant in ${VARIANTS:-}; do  # a wheel's @BACKWARD stays behind its path
  wheel=${variant#*=}
  case $wheel in *@*) backward=@${wheel##*@} ;; *) backward= ;; esac
  builds+="${variant%%=*}=$(realpath "${wheel%@*}")$backward "
done
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
DRY=${DRY:-}
END=$(($(date +%s) + ${LIMIT:-$limit}))
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir "$WORK/logs-$CALL"
failed=0
export OUT PYTHON WORK CALL DRY WHEEL="${WHEEL:-}" PEERS="${PEERS:-}" VARIANTS=$builds
if [ -n "$DRY" ]; then  # with what is built in this folder, or else installed
  if compgen -G 'bhyt/_ops*.so' > /dev/null; then export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}; fi
elif ! nvidia-smi > /dev/null 2>&1; then
  echo "run_gpu.sh: no NVIDIA GPU here" >&2
  exit 100
fi
commit=$(git rev-parse HEAD 2> /dev/null)

record() {  # name, status, seconds: a line; all of them as JSON, and all logs, as they are so far
  printf '%s\t%s\t%s\n' "$@" | tee -a "$WORK/stages.txt"
  awk -F '\t' -v commit="$commit" -v dry="${DRY:+true}" '
    BEGIN { printf "{\"commit\": \"%s\", \"dry\": %s, \"stages\": [", commit, dry ? dry : "false" }
    { printf "%s\n {\"stage\": \"%s\", \"status\": \"%s\", \"seconds\": %d}", (NR > 1 ? "," : ""), $1, $2, $3 }
    END { print "\n]}" }' "$WORK/stages.txt" > "$WORK/stages.json"
  tar -C "$WORK" -czf "$WORK/logs.tar.gz" "logs-$CALL"
  mv "$WORK/stages.json" "$OUT/stages-$CALL.json"
  mv "$WORK/logs.tar.gz" "$OUT/logs-$CALL.tar.gz"
}

stage() {  # name, seconds, command...
  local name=$1 seconds=$2 began left status log=$WORK/logs-$CALL/$1.log
  shift 2
  began=$(date +%s)
  left=$((END - began))
  [ "$left" -lt "$seconds" ] && seconds=$left
  [ -n "$DRY" ] && seconds=10000
  if [ "$seconds" -le 3 ]; then
    status="not run: no time left"
    failed=$((failed + 1))
  else
    STAGE_END=$((began + seconds)) timeout --kill-after=3 "$seconds" "$@" > "$log" 2>&1
    status=$?
    case $status in
      0) status=passed ;;
      124 | 137) status="stopped after $seconds s"; failed=$((failed + 1)) ;;
      *) status="failed ($status)"; failed=$((failed + 1)) ;;
    esac
  fi
  record "$name" "$status" "$(($(date +%s) - began))"
  [ "$status" = passed ] || tail -n 5 "$log" 2> /dev/null
}

. benchmarks/gpu_stages.sh
if [ "$CALL" = first ]; then
  rm -f "$OUT"/*.json "$OUT"/*.tar.gz
  stage device 5 bash -c device_facts
  if [ -n "$WHEEL" ]; then stage install 25 bash -c install; else stage build 110 bash -c build; fi
  stage check 15 bash -c quick_check
  stage experiments 45 bash -c experiments
  stage ncu 20 bash -c profile
  stage goals 75 bash -c "benchmark goals,decode"
  stage large 25 bash -c "benchmark large"
  stage tests 125 bash -c "pytest -m 'not slow' -k 'cuda and not host'"
  if [ -n "$WHEEL" ]; then stage more 85 bash -c "benchmark goals,decode,large,quantized,more"; fi
else
  stage install 20 bash -c install
  stage variants 110 bash -c variants
  stage sanitizers 60 bash -c sanitize
  stage only_a_gpu 30 bash -c "pytest -k test_gpu"
  stage peers 80 bash -c benchmark_peers
fi
exit "$failed"
