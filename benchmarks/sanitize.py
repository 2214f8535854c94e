"""Every compiled kernel's own check, once, on few rows: what ``sanitize.sh`` runs under its tool.

sanitize.py [--none-is-fine] DTYPE...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from fused_lora.kernels.cuda import native
from fused_lora.verify import launch_checks
from fused_lora.verify.kernel_registry import compiled_grads, of_compiled_merge

ROWS = 53  # four tiles, the last of five rows; a racecheck takes a hundred times as long


def main(arguments: Sequence[str]) -> int:
    """0 where every kernel is right, 1 where one is not, 2 where none can run."""
    dtypes = [word for word in arguments if not word.startswith("--")]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if reason := native.why_not_on(device):
        print(f"nothing can run here: {reason}")
        return 0 if "--none-is-fine" in arguments else 2
    launch_checks.ROWS = ROWS
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # without which tf32 is not served
    right = True
    for dtype in dtypes:
        merges = [] if dtype == "tf32" else [of_compiled_merge(dtype)]
        for checked in (*compiled_grads(dtype, device), *merges):
            verdict = checked.check(device)
            right &= verdict.passed
            print(f"{'passed' if verdict.passed else 'FAILED'}  {checked.subject}: {verdict}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
