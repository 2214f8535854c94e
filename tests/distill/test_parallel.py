"""Two gloo processes come to what one process with twice the batch comes to: SLAD, FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.fsdp import FSDPModule

from fused_lora.distill.models import read
from fused_lora.distill.recipe import Recipe
from fused_lora.distill.run import distill
from fused_lora.distill.train.checkpoint import CheckpointError, header_of
from fused_lora.distill.train.fit import LAST, Fit
from tests.distill.runs import checkpoint, recipe, slad_recipe

pytestmark = pytest.mark.slow
FILES = ("student.safetensors", LAST)
TWO = {"batch_size": 4, "accumulate": 2}


def train(**table: object) -> dict:
    """Steps of 16 of 37 images or so; the last of an epoch is a small one."""
    return {"precision": "fp64", "steps": 4, "batch_size": 16, "save_every": 2} | table


def wecolora(folder: Path, **table: object) -> Recipe:
    return recipe(
        teacher={"checkpoint": checkpoint(folder)}, data={"fraction": 0.03}, train=train(**table)
    )


def joint(folder: Path, **table: object) -> Recipe:
    return slad_recipe(folder, data={"fraction": 0.03}, train=train(**table))


def two_step(folder: Path, **table: object) -> Recipe:
    return slad_recipe(folder, "two_step", data={"fraction": 0.03}, train=train(**table))


CASES: dict[str, tuple[Callable[..., Recipe], str]] = {
    "joint_ddp": (joint, "ddp"),
    "two_step_ddp": (two_step, "ddp"),
    "joint_fsdp2": (joint, "fsdp2"),
    "two_step_fsdp2": (two_step, "fsdp2"),
    "wecolora_fsdp2": (wecolora, "fsdp2"),
}


class Killed(Exception):
    """The machine went away."""


def broken_off(asked: Recipe, folder: Path) -> int:
    """Run ``asked`` until a step after its first checkpoint; how many modules were in shards."""
    step, sharded = Fit._step, []

    def stops(fit: Fit, number: int, micro: list) -> None:
        if number == 3:
            sharded.append(sum(isinstance(each, FSDPModule) for each in fit.objective.modules()))
            raise Killed
        step(fit, number, micro)

    Fit._step = stops  # type: ignore[method-assign]
    try:
        distill(asked, folder)
    except Killed:
        return sharded[0]
    finally:
        Fit._step = step  # type: ignore[method-assign]
    raise AssertionError("it ran to the end")


def work(rank: int, folder: Path) -> None:
    """What each of the processes runs."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name, (make, parallel) in CASES.items():
        distill(make(folder, parallel=parallel, **TWO), folder / name)
    asked = joint(folder, parallel="fsdp2", **TWO)
    units = broken_off(asked, folder / "broken")
    if rank == 0:
        assert header_of(folder / "broken" / LAST)["step"] == 2
        (folder / "units").write_text(str(units))
    distill(asked, folder / "broken")
    broken_off(asked, folder / "taken_over")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes leave their runs, beside those of one process."""
    home = tmp_path_factory.mktemp("parallel")
    for make in (joint, wecolora):
        make(home)  # the weights, before two processes want to write them
    multiprocessing.spawn(work, (home,), nprocs=2)
    for make in (joint, two_step, wecolora):
        distill(make(home), home / make.__name__)
    return home


def close(one: Path, other: Path) -> None:
    """The same tensors by the same names."""
    mine, theirs = read(one), read(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], rtol=1e-8, atol=1e-11), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file", FILES)
def test_the_same_weights_as_one_process(folder: Path, case: str, file: str) -> None:
    alone = CASES[case][0].__name__
    close(folder / case / file, folder / alone / file)


@pytest.mark.parametrize("case", ["joint_ddp", "joint_fsdp2", "two_step_fsdp2"])
def test_the_same_heads(folder: Path, case: str) -> None:
    alone = CASES[case][0].__name__
    close(folder / case / "heads.safetensors", folder / alone / "heads.safetensors")


def test_it_was_in_shards(folder: Path) -> None:
    assert int((folder / "units").read_text()) == 4 + 2 + 1  # both models' blocks, and the rest


def test_a_run_in_shards_goes_on_where_it_was_killed(folder: Path) -> None:
    for file in FILES:
        mine, theirs = (read(folder / run / file) for run in ("broken", "joint_fsdp2"))
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_one_process_takes_over_a_checkpoint_of_two(folder: Path) -> None:
    assert header_of(folder / "taken_over" / LAST)["step"] == 2
    distill(joint(folder), folder / "taken_over")
    for file in FILES:
        close(folder / "taken_over" / file, folder / "joint" / file)


def test_a_step_of_other_images_is_another_run(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="images_per_step was 16 and is 8"):
        distill(joint(folder, **TWO), folder / "joint", fresh=False)
