"""Bound launches over a driver that runs nothing: kernels are told what Triton tells them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_lora.kernels.triton import available

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNELS = {"shrink", "extended", "partial_sums", "add_slices", "layer_norm", "layer_norm_grad"}
KERNELS |= {"gelu_rows", "extended_bulk"}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not here")
@pytest.mark.skipif(bool(available.why_not_here()), reason=str(available.why_not_here()))
def test_a_step_of_a_block_launches_what_triton_would(tmp_path):
    library = tmp_path / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(["gcc", *flags, str(HERE / "accepting_driver.c")], check=True)
    own = {"LD_LIBRARY_PATH": tmp_path, "TRITON_LIBCUDA_PATH": tmp_path, "PYTHONPATH": ROOT}
    own |= {"TRITON_CACHE_DIR": tmp_path / "triton", "FUSED_LORA_CACHE_DIR": tmp_path / "kept"}
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.host_road"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    said = {name: words for name, words in lines if name != "programs"}
    assert said.keys() >= KERNELS, said.keys()
    assert len(lines) > 30 and "OTHER" not in done.stdout, done.stdout
