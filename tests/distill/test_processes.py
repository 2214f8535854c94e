"""Runs in processes of their own: two that share one run, and one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from fused_lora.distill.models import read
from fused_lora.distill.recipe import read as read_recipe
from fused_lora.distill.run import distill
from fused_lora.distill.train.checkpoint import header_of
from tests.distill.runs import OPTIONS, checkpoint, recipe

STEPS = 7


def tables(folder: Path, **train: object) -> dict:
    """One fp64 run on 37 images a step of 16: the last step of an epoch is a small one."""
    return {
        "teacher": {"checkpoint": checkpoint(folder)},
        "data": {"fraction": 0.03},
        "train": {"precision": "fp64", "steps": STEPS, "save_every": 100} | train,
    }


def one_of_two(rank: int, folder: Path, train: dict) -> None:
    """What each of the processes runs."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    distill(recipe(**tables(folder, **train)), folder / "two")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    train = {"batch_size": 4, "accumulate": 2}
    multiprocessing.spawn(one_of_two, (tmp_path, train), nprocs=2)
    distill(recipe(**tables(tmp_path, batch_size=16)), tmp_path / "one")
    one, two = (read(tmp_path / run / "student.safetensors") for run in ("one", "two"))
    before = read(tmp_path / "teacher.safetensors")
    assert not torch.equal(one["blocks.1.mlp.fc1.weight"], before["blocks.2.mlp.fc1.weight"])
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-9, atol=1e-12), name


KILLED = """
[teacher]
model = "vit_tiny_patch16_224"
checkpoint = "teacher.safetensors"
options = {options}
[student]
rank = 2
[train]
steps = 100
batch_size = 16
save_every = 5
blr = 0.1
"""


def test_kill_9_in_the_middle_and_again_is_the_run_unbroken(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    options = "{" + ", ".join(f"{key} = {value}" for key, value in OPTIONS.items()) + "}"
    (tmp_path / "r.toml").write_text(KILLED.replace("{options}", options))
    last = tmp_path / "run" / "last.safetensors"
    command = [sys.executable, "-m", "fused_lora.cli", "distill", str(tmp_path / "r.toml")]
    process = subprocess.Popen(
        [*command, "--out", str(last.parent)], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    limit_s = time.monotonic() + 240
    while not last.is_file() and process.poll() is None and time.monotonic() < limit_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert header_of(last)["step"] < 100
    asked = read_recipe(tmp_path / "r.toml")
    with one_thread():
        ends = [distill(asked, tmp_path / run) and tmp_path / run for run in ("run", "unbroken")]
    one, other = (read(run / "student.safetensors") for run in ends)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (ends[0] / "log.jsonl").read_text() == (ends[1] / "log.jsonl").read_text()


@contextmanager
def one_thread() -> Iterator[None]:
    """The bits of a sum depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
