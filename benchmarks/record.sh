#!/usr/bin/env bash
# Records what this checkout does on a fresh GPU machine, most valuable first, within a time budget.
#
#   benchmarks/record.sh [--dry-run] OUTDIR [MINUTES=8]
#
# Needs torch, triton, nvcc, cmake, ninja, pybind11, timm, peft and pytest; no network. Leaves in
# OUTDIR: log.txt, steps.tsv, summary.md, selftest-*.jsonl, rows/<device>/*.jsonl, report-*.html and
# cache/ (verdicts, ceilings, tiles). Every step runs under what time is left; one that fails or is
# cut short does not stop the next, and is named in the summary. The exit status is 1 if one failed.
#
# SANITIZE=1 adds the compiled kernels' checks under compute-sanitizer, about two minutes.
# --dry-run takes the same road on a CPU in tiny shapes, without building.
# PYTHON names the interpreter (python3).
set -u
cd "$(dirname "$0")/.." || exit 2

dry=0
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
[ $# -ge 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
minutes=${2:-8}
case $minutes in '' | *[!0-9]*) echo "record.sh: MINUTES is a whole number, got '$minutes'" >&2; exit 2 ;; esac
deadline=$(($(date +%s) + 60 * minutes))
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OUT=$out
export FUSED_LORA_CACHE_DIR=$out/cache
log=$out/log.txt
: >"$log"
printf 'step\tstatus\tseconds\n' >"$out/steps.tsv"

# step NAME SECONDS COMMAND: runs COMMAND for at most SECONDS, and no longer than there is time.
step() {
  local name=$1 most=$2 left began rc status
  left=$((deadline - $(date +%s)))
  if [ "$left" -lt 5 ]; then
    printf '%s\tno time left\t0\n' "$name" >>"$out/steps.tsv"
    return
  fi
  echo "== $name" | tee -a "$log"
  began=$(date +%s)
  timeout --kill-after=5 "$((left < most ? left : most))" bash -c "$3" >>"$log" 2>&1
  rc=$?
  case $rc in 0) status=ok ;; 124 | 137) status="cut short" ;; *) status="FAILED ($rc)" ;; esac
  printf '%s\t%s\t%s\n' "$name" "$status" "$(($(date +%s) - began))" >>"$out/steps.tsv"
}

# Both dtypes at once: compiling is most of it, and it is one core's work.
selftests='
  for dtype in $DTYPES; do
    "$PYTHON" -m fused_lora.cli selftest --dtype "$dtype" --json "$OUT/selftest-$dtype.jsonl" & pids="${pids:-} $!"
  done
  for pid in $pids; do wait "$pid" || rc=$?; done
  exit "${rc:-0}"'
bench='"$PYTHON" -m fused_lora.cli bench --rows "$OUT/rows"'
contenders=frozen,naive,naive_joint,peft,peft_bf16,addmm,fused,fused_joint
base=vit_base_patch16_224 small=vit_small_patch16_224 large=vit_large_patch16_224

if [ $dry = 1 ]; then
  export DTYPES=bfloat16
  tiny="--device cpu --models $small --batch 1 --ranks 4 --dtype fp32 --contenders frozen,naive,fused"
  step environment 300 '"$PYTHON" -m fused_lora.cli env'
  step selftest 300 "$selftests"
  step gpu-tests 300 '"$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_triton_on_device.py -m gpu'
  step six-projections 300 "$bench $tiny --suite six_projections --budget-seconds 1 --out \$OUT/report-six.html"
  step broken 300 "${DRY_STEP:-true}"
  step train-step 300 "$bench $tiny --suite train_step --budget-seconds 1 --out \$OUT/report-step.html"
  step sanitize 300 'benchmarks/sanitize.sh --dry-run "$OUT/sanitize"'
else
  export DTYPES="bfloat16 float32"
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch
print(".".join(map(str, torch.cuda.get_device_capability())))')}
  export TORCH_CUDA_ARCH_LIST
  step build 120 '"$PYTHON" -m pip install --no-build-isolation --no-deps -e .'
  step environment 30 'nvidia-smi; "$PYTHON" -m fused_lora.cli env'
  step selftest 180 "$selftests"
  step gpu-tests 180 '"$PYTHON" -m pytest -q -p no:cacheprovider tests -m gpu'
  six="$bench --suite six_projections --contenders $contenders"
  step six-projections 45 "$six --models $base --ranks 16 --batch 128 --dtype bf16,amp --budget-seconds 20 --out \$OUT/report-six.html"
  step six-projections-graph-cold 45 "$six --models $base --ranks 16 --batch 128 --dtype bf16 --mode eager,graph --cache cold,warm --budget-seconds 20 --out \$OUT/report-graph.html"
  step grid 150 "$six --models $base,$small,$large --batch 128,32,100,256 --ranks 16,64,256,512 --dtype bf16 --budget-seconds 60 --out \$OUT/report-grid.html"
  step train-step 90 "$bench --suite train_step --models $base --batch 128 --ranks 16,256 --dtype amp --contenders frozen,naive,peft,fused,fused_joint --budget-seconds 40 --out \$OUT/report-step.html"
  step plan-choice 90 "$bench --suite plan_choice --models $base --batch 128 --ranks 16,64,256,512 --dtype bf16 --budget-seconds 60"
  [ "${SANITIZE:-0}" = 1 ] && step sanitize 240 'DTYPES=bfloat16 benchmarks/sanitize.sh "$OUT/sanitize"'
  step tune 120 '"$PYTHON" -m fused_lora.cli tune --model vit_base_patch16_224 --batch 128 --rank 16'
fi

"$PYTHON" benchmarks/summary.py "$out" | tee "$out/summary.md"
! grep -q FAILED "$out/steps.tsv"
