#!/usr/bin/env bash
# Builds for each version of torch given and runs what depends on it: ops, autograd, compile, TorchScript, export.
#
#     tests/build/torch_versions.sh 2.7.1 2.15.0
#
# Each in an environment of its own, several GB from the package index, removed afterwards; those in the folder
# TORCH_ENVIRONMENTS are used and kept. Prints a line for each, for the table in docs/torch.md; exits with 1 when any
# failed. The committed state is what is tested.
set -euo pipefail
cd "$(dirname "$0")/../.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
environments="${TORCH_ENVIRONMENTS:-$work}"
mkdir -p "$environments"
files=(ops/{accuracy,autograd,opcheck,determinism,errors,dtypes} modules/{modules,modules_in_use,offset,block,gain}
  compile/{compile,compile_reports,deploy} build/package engines/deploy_page)
paths=("${files[@]/\///test_}")
paths=("${paths[@]/#/tests/}")
paths=("${paths[@]/%/.py}")
failed=0

for version in "$@"; do
  environment="$environments/torch-$version"
  log="$environments/torch-$version.log"
  source="$work/source-$version"
  [ -d "$environment" ] || "${PYTHON:-python3}" -m venv "$environment"
  pip=("$environment/bin/pip" --disable-pip-version-check)
  outcome="does not build"
  if {
    "${pip[@]}" install -q --no-compile "torch==$version" numpy "setuptools>=77" wheel ninja packaging pytest \
      hypothesis expecttest cmake &&
      mkdir "$source" && git archive HEAD | tar -x -C "$source" &&
      (cd "$source" && BHYT_CUDA=0 BHYT_CXXFLAGS=-O1 "${pip[@]}" wheel -q --no-build-isolation --no-deps -w dist .) &&
      "${pip[@]}" install -q --no-deps --force-reinstall "$source"/dist/bhyt-*.whl
  } > "$log" 2>&1; then
    rm -rf "$source/bhyt"  # the installed package is tested
    (cd "$source" && PATH="$environment/bin:$PATH" OMP_NUM_THREADS=1 python -m pytest -q -m "not slow" \
      "${paths[@]}" --override-ini addopts= 2>&1 || true) >> "$log"
    outcome="$(grep -E '^=*.*(passed|failed|error).* in ' "$log" | tail -1 | tr -d '=' | sed 's/ in .*//; s/^ *//')"
  fi
  echo "| $version | ${outcome:-stopped: see $log} |"
  case "$outcome" in *failed* | *error* | "" | "does not build") failed=1 && tail -30 "$log" >&2 ;; esac
  [ -n "${TORCH_ENVIRONMENTS:-}" ] || rm -rf "$environment"
done
exit "$failed"
