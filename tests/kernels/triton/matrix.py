"""The compile matrix: every launch that ships, compiled for one architecture and kind of products,
and launched over the stub driver of that chip.

    python -m tests.kernels.triton.matrix bf16 90

A column is made in a process of its own, which compiles each kernel once and launches it there: a
second process would read it all again. It is kept in a folder while the sources of the kernels and
of these tests and the versions stay as they are; single kernels are kept beside it under Triton's
own key. bf16 stands for fp16, which differs in one letter.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from fused_lora.kernels.triton import lora_linear_fp8, tiles
from tests.kernels.triton import shipped, stub
from tests.kernels.triton.compiler import Resources, compiled

ROOT = Path(__file__).parents[3]
KINDS = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Column:
    """Every launch on one chip."""

    kernels: list[Resources]  # each once
    refused: list[str]  # launches that the driver, or Triton for want of room, said no to; and why
    launches: int  # that were not refused
    maps: int  # tensor maps made for them


def column(kind: str, arch: int, folder: Path) -> Column:
    """What every launch takes and comes to on sm_``arch``: as kept in ``folder``, else made now."""
    kept = folder / f"{kind}-{arch}-{triton.__version__}.json"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # by one process of several that ask
        return _column(kind, arch, folder, kept)


def _column(kind: str, arch: int, folder: Path, kept: Path) -> Column:
    if kept.exists() and (found := json.loads(kept.read_text()))["key"] == key():
        return _read(found["column"])
    with tempfile.TemporaryDirectory() as own:
        done = stub.run(Path(own), "matrix", kind, str(arch), cache=folder)
    found = {"key": key(), "column": json.loads(done.stdout.splitlines()[-1])}
    half = kept.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(found))
    half.replace(kept)
    return _read(found["column"])


def _read(column: dict) -> Column:
    kernels = [Resources(**kernel) for kernel in column["kernels"]]
    return Column(**{**column, "kernels": kernels})


def key() -> str:
    """Of everything that a column depends on."""
    here, library = Path(__file__).parent, ROOT / "fused_lora"
    sources = [*sorted((library / "kernels" / "triton").glob("*.py")), library / "types.py"]
    sources += [library / "reference" / "lora_linear_fp8.py", library / "kernels" / "interface.py"]
    sources += [here / name for name in ("compiler.py", "shipped.py", "stub.py", "stub_driver.c")]
    known = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for source in [*sources, Path(__file__)]:
        known.update(source.read_bytes())
    return known.hexdigest()


def make_column(kind: str, arch: int) -> Column:
    """Every launch compiled and launched in this process, which is for no other chip."""
    for module in (tiles, lora_linear_fp8):
        module.architecture = lambda device: arch
    driver = stub.serve(arch)
    refused: list[str] = []
    x = torch.zeros(shipped.M, shipped.K, dtype=KINDS[kind])
    precision = "tf32" if kind == "tf32" else "ieee"
    with fp32_products(precision), compiled(arch, refused=refused) as kernels:
        for launch in shipped.all_launches(x, arch):
            before, so_far = len(kernels), len(refused)
            launch.run()
            said = {"of": launch.kernel, "tile": shipped.words(launch.tile)}
            kernels[before:] = [replace(kernel, **said) for kernel in kernels[before:]]
            refused[so_far:] = [f"{said['of']}: {said['tile']}: {no}" for no in refused[so_far:]]
    once = {tuple(map(str, asdict(kernel).values())): kernel for kernel in kernels}
    return Column(list(once.values()), refused, driver.launches, driver.maps)


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
    torch.set_num_threads(1)
    print(json.dumps(asdict(make_column(sys.argv[1], int(sys.argv[2])))))
