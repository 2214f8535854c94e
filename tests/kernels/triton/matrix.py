"""The compile matrix: every launch that ships, compiled for one architecture and kind of products.

    python -m tests.kernels.triton.matrix bf16 90

A column is compiled in a process of its own and kept in a folder while the sources of the kernels
and of these tests and the versions stay as they are; single kernels are kept beside it under
Triton's own key. bf16 stands for fp16, which differs in one letter.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from fused_lora.kernels.triton import lora_linear_fp8, tiles
from tests.kernels.triton import shipped
from tests.kernels.triton.compiler import Resources, compiled

ROOT = Path(__file__).parents[3]
KINDS = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def column(kind: str, arch: int, folder: Path) -> list[Resources]:
    """What every launch takes on sm_``arch``: as kept in ``folder``, else compiled now."""
    kept = folder / f"{kind}-{arch}-{triton.__version__}.json"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # by one process of several that ask
        return _column(kind, arch, folder, kept)


def _column(kind: str, arch: int, folder: Path, kept: Path) -> list[Resources]:
    if kept.exists() and (found := json.loads(kept.read_text()))["key"] == key():
        return [Resources(**kernel) for kernel in found["kernels"]]
    command = [sys.executable, "-m", __name__, kind, str(arch)]
    where = {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {"key": key(), "kernels": json.loads(done.stdout.splitlines()[-1])}
    half = kept.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(found))
    half.replace(kept)
    return [Resources(**kernel) for kernel in found["kernels"]]


def key() -> str:
    """Of everything that a column depends on."""
    here, library = Path(__file__).parent, ROOT / "fused_lora"
    sources = [*sorted((library / "kernels" / "triton").glob("*.py")), library / "types.py"]
    sources += [library / "reference" / "lora_linear_fp8.py"]
    sources += [library / "kernels" / "interface.py", here / "compiler.py", here / "shipped.py"]
    known = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for source in [*sources, Path(__file__)]:
        known.update(source.read_bytes())
    return known.hexdigest()


def compile_column(kind: str, arch: int) -> list[Resources]:
    """What every launch takes, compiled in this process, which compiles for no other chip."""
    for module in (tiles, lora_linear_fp8):
        module.architecture = lambda device: arch
    x = torch.zeros(shipped.M, shipped.K, dtype=KINDS[kind])
    with fp32_products("tf32" if kind == "tf32" else "ieee"), compiled(arch) as kernels:
        for launch in shipped.all_launches(x, arch):
            before = len(kernels)
            launch.run()
            said = {"of": launch.kernel, "tile": shipped.words(launch.tile)}
            kernels[before:] = [replace(kernel, **said) for kernel in kernels[before:]]
    return list({tuple(map(str, asdict(kernel).values())): kernel for kernel in kernels}.values())


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Torch's setting, inside."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, precision
    try:
        yield
    finally:
        setting.fp32_precision = before


if __name__ == "__main__":
    print(json.dumps([asdict(kernel) for kernel in compile_column(sys.argv[1], int(sys.argv[2]))]))
