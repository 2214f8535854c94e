#!/usr/bin/env bash
# Records what this checkout does on a fresh GPU machine, most valuable first, within a time budget.
#
#   benchmarks/record.sh [--dry-run] OUTDIR [MINUTES=8]
#
# Builds, compiles and checks in a pool of processes what will be timed, then: timed rows (the six
# projections as graphs and eager, training steps with the host's share beside), checks of CUDA's
# kernels, of Triton's, the tests marked gpu, and last the grid, the plan's choices, tiles and,
# where SANITIZE=1, the sanitizer.
#
# Needs torch, triton, nvcc, cmake, ninja, pybind11, timm and peft; pytest for the tests; no network.
# Leaves in OUTDIR: log.txt, steps.tsv, summary.md, selftest-*.jsonl, rows/<device>/*.jsonl,
# report-*.html, cache/ (verdicts, ceilings, plans, tiles) and triton/ (compiled kernels). Each
# result is appended when it is there, so that a run that is cut keeps what it did. Every step has a
# limit, and no more than the time left; one that fails or is cut does not stop the next, and is
# named in the summary. The last column of steps.tsv counts what a step compiled, checked or timed
# anew; a timed step should find everything prepared. The exit status is 1 if a step failed.
#
# --dry-run takes the same road on a CPU in tiny shapes, without building; there, a timed step that
#   does anew what was to be prepared is a failure.
# PYTHON names the interpreter (python3), JOBS how many processes compile and check at once (16).
set -u
cd "$(dirname "$0")/.." || exit 2

dry=0
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
[ $# -ge 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
minutes=${2:-8}
case $minutes in '' | *[!0-9]*) echo "record.sh: MINUTES is a whole number, got '$minutes'" >&2; exit 2 ;; esac
export JOBS=${JOBS:-16}
case $JOBS in '' | *[!0-9]* | 0) echo "record.sh: JOBS is a whole number from 1 on, got '$JOBS'" >&2; exit 2 ;; esac
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
deadline=$(($(date +%s) + 60 * minutes))
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OUT=$out
export FUSED_LORA_CACHE_DIR=$out/cache TRITON_CACHE_DIR=$out/triton MAX_JOBS=$JOBS
log=$out/log.txt
mkdir -p "$out/rows"
: >"$log"
printf 'step\tstatus\tseconds\tanew\n' >"$out/steps.tsv"
running='' name=''

# Everything that is compiled, checked or timed once and then kept.
kept() {
  local cubins rows
  cubins=$(find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l)
  rows=$(cat "$FUSED_LORA_CACHE_DIR"/{verdicts,plans,ceilings}.json 2>/dev/null | grep -c '^ "')
  echo $((cubins + rows))
}

written() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$out/steps.tsv"; }

summarised() { "$PYTHON" benchmarks/summary.py "$out" >"$out/summary.md"; }

# A signal ends the step that runs, and what was done is summarised.
cut_short() {
  [ -n "$running" ] && { kill -TERM -- "-$running" 2>/dev/null; written "$name" "killed" 0 0; }
  summarised
  exit 143
}
trap cut_short TERM INT HUP

# step NAME SECONDS COMMAND: runs COMMAND for at most SECONDS, and no longer than there is time.
# With TIMED before it, in a dry run, nothing may be done anew in it.
step() {
  local most=$2 left began before rc status anew
  name=$1
  left=$((deadline - $(date +%s)))
  if [ "$left" -lt 5 ]; then
    written "$name" "no time left" 0 0
    return
  fi
  echo "== $name" | tee -a "$log"
  began=$(date +%s) before=$(kept)
  # A group of its own, so that nothing of it outlives its limit.
  setsid timeout --kill-after=5 "$((left < most ? left : most))" bash -c "$3" >>"$log" 2>&1 &
  running=$!
  wait "$running"
  rc=$?
  kill -KILL -- "-$running" 2>/dev/null
  running=''
  anew=$(($(kept) - before))
  case $rc in 0) status=ok ;; 124 | 137) status="cut short" ;; *) status="FAILED ($rc)" ;; esac
  if [ $dry = 1 ] && [ "${TIMED:-0}" = 1 ] && [ "$anew" -gt 0 ]; then
    status="FAILED ($anew done anew that were to be prepared)"
  fi
  written "$name" "$status" "$(($(date +%s) - began))" "$anew"
}

bench='"$PYTHON" -m fused_lora.cli bench --rows "$OUT/rows"'
selftest='"$PYTHON" -m fused_lora.cli selftest --processes "$JOBS"'
base=vit_base_patch16_224 small=vit_small_patch16_224 large=vit_large_patch16_224

# Whether the module that was built serves this machine's GPU, with every kernel written for it.
serves='"$PYTHON" -c "
import sys, torch
from fused_lora.kernels.cuda import lora_linear, native
major, _ = torch.cuda.get_device_capability()
reason = native.why_not() or (lora_linear.why_not_compiled() if major == 9 else None)
sys.exit(reason)"'

if [ $dry = 1 ]; then
  export FUSED_LORA_PLAN=measure
  tiny="--device cpu --models $small --batch 1 --ranks 4 --dtype fp32 --budget-seconds 1"
  six="$tiny --suite six_projections --methods frozen,naive,fused"
  train="$tiny --suite train_step --methods frozen,naive,peft,fused,fused_block"
  build=true environment='"$PYTHON" -m fused_lora.cli env'
  graph="$six" eager="$six" tests=tests/ops/test_triton_on_device.py
  grid="${DRY_STEP:-true}" choice=true tune=true
  sanitize='benchmarks/sanitize.sh --dry-run "$OUT/sanitize"' SANITIZE=1
else
  [ -n "${TORCH_CUDA_ARCH_LIST:-}" ] || TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch
print(".".join(map(str, torch.cuda.get_device_capability())))')
  export TORCH_CUDA_ARCH_LIST
  usual="--models $base --ranks 16 --batch 128"
  six="$usual --suite six_projections --methods frozen,naive,naive_joint,peft,peft_bf16,addmm,fused,fused_joint"
  train="$usual --suite train_step --dtype amp --methods frozen,naive,peft,fused,fused_block --budget-seconds 40"
  build='FUSED_LORA_NATIVE=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -e . && '$serves
  environment='nvidia-smi; "$PYTHON" -m fused_lora.cli env'
  graph="$six --dtype bf16 --mode graph --budget-seconds 15"
  eager="$six --dtype bf16,amp --budget-seconds 20"
  tests='tests/kernels/cuda/test_lora_grad.py tests/kernels/cuda/test_add_partials.py tests/kernels/cuda/test_lora_merge.py
    tests/kernels/triton/test_on_device.py tests/kernels/triton/test_fp8_on_device.py
    tests/ops/test_parity.py tests/ops/test_lora_merge.py tests/ops/test_triton_on_device.py
    tests/kernels/aten/test_attention.py tests/nn/test_shared_parameters.py tests/stacks/test_cuda_graphs.py
    tests/bench/test_roofline.py'
  grid="$bench --suite six_projections --models $base,$small,$large --batch 128,32,100,256 --ranks 16,64,256,512 --methods frozen,naive,peft,fused --dtype bf16 --budget-seconds 60 --out \$OUT/report-grid.html"
  choice="$bench --suite plan_choice --models $base --batch 128 --ranks 16,64,256,512 --dtype bf16 --budget-seconds 60"
  tune='"$PYTHON" -m fused_lora.cli tune --model vit_base_patch16_224 --batch 128 --rank 16'
  sanitize='DTYPES=bfloat16 benchmarks/sanitize.sh "$OUT/sanitize"'
fi
# On twelve processes, where xdist is there.
pytest='"$PYTHON" -m pytest -q -p no:cacheprovider -m gpu --tb=short $SPREAD'
[ $dry = 0 ] && "$PYTHON" -c 'import xdist' 2>/dev/null && SPREAD='-n 12'
export SPREAD=${SPREAD:-}

step build 150 "$build"
step environment 30 "$environment"
step prepare-six 90 "$bench $eager --prepare"
step prepare-train 90 "$bench $train --prepare"
TIMED=1 step six-graph 60 "$bench $graph --out \$OUT/report-graph.html"
TIMED=1 step six-eager 60 "$bench $eager --out \$OUT/report-six.html"
TIMED=1 step train-step 90 "$bench $train --out \$OUT/report-step.html"
step cuda-checks 60 "$selftest --backend cuda --json \"\$OUT/selftest-cuda.jsonl\""
step triton-checks 120 "$selftest --backend triton --dtype bfloat16,float32 --json \"\$OUT/selftest-triton.jsonl\""
step gpu-tests 120 "$pytest ${tests//$'\n'/ }"
step grid 120 "$grid"
step plan-choice 90 "$choice"
step tune 90 "$tune"
[ "${SANITIZE:-0}" = 1 ] && step sanitize 240 "$sanitize"

summarised
cat "$out/summary.md"
! grep -q FAILED "$out/steps.tsv"
