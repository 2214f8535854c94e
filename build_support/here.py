"""What can be run on this machine, for installs that need not serve another.

python -m build_support.here      one line on what the compiled module is built for, and why
"""

from __future__ import annotations

import os
import shutil
import subprocess

from build_support.archs import DEFAULT


def gpus() -> list[str]:
    """The architectures of this machine's GPUs as TORCH_CUDA_ARCH_LIST spells them."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return list(dict.fromkeys(line.strip() for line in done.stdout.splitlines() if line.strip()))


def text() -> str:
    """What is built where FUSED_LORA_NATIVE is ``here``, and why."""
    asked = os.environ.get("FUSED_LORA_NATIVE", "").strip()
    if asked != "here":
        return f"the compiled module: as FUSED_LORA_NATIVE={asked} says"
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return f"the compiled module: for {listed}, as TORCH_CUDA_ARCH_LIST says"
    if found := gpus():
        return f"the compiled module: for {';'.join(found)} alone, the GPUs here"
    return (
        "the compiled module: not built, since nvidia-smi lists no GPU that could run it; "
        f"`make install` builds it for {DEFAULT}"
    )


if __name__ == "__main__":
    print(text())
