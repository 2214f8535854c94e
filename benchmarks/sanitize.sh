#!/usr/bin/env bash
# Runs every check of the compiled kernels under compute-sanitizer: memcheck, racecheck, synccheck.
#
#   benchmarks/sanitize.sh [--dry-run] OUTDIR
#
# Leaves OUTDIR/<tool>.txt, each with one line per kernel. The exit status is 1 if a tool or a
# kernel's check found something, 2 if nothing can run here. --dry-run takes the same road once,
# without the tool, and passes where there is no device. PYTHON names the interpreter (python3), SANITIZER
# the tool (compute-sanitizer), DTYPES what is checked ("bfloat16 float16 tf32").
set -u
cd "$(dirname "$0")/.." || exit 2

dry=
checks="memcheck racecheck synccheck"
[ "${1:-}" = --dry-run ] && { dry=--none-is-fine checks=memcheck; shift; }
[ $# -eq 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
mkdir -p "$1" || exit 2
tool=${SANITIZER:-compute-sanitizer}
if [ -z "$dry" ] && ! command -v "$tool" >/dev/null; then
  echo "sanitize.sh: $tool is not on PATH; it comes with the CUDA toolkit" >&2
  exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTORCH_NO_CUDA_MEMORY_CACHING=1

status=0
for check in $checks; do
  under=("$tool" --tool "$check" --error-exitcode 9 --target-processes all)
  [ -n "$dry" ] && under=()
  # shellcheck disable=SC2086
  "${under[@]}" "${PYTHON:-python3}" benchmarks/sanitize.py $dry ${DTYPES:-bfloat16 float16 tf32} \
    >"$1/$check.txt" 2>&1
  rc=$?
  case $rc in 0) said=clean ;; 2) said="cannot run" status=2 ;; *) said="FAILED ($rc)" status=1 ;; esac
  echo "$check: $said, $1/$check.txt"
  [ $rc -eq 0 ] || tail -5 "$1/$check.txt"
done
exit $status
