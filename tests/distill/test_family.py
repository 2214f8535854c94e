"""A smaller backbone that learns its teacher's features, and SLAD from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fused_lora.distill import load_student
from fused_lora.distill.blocks import tokens_of
from fused_lora.distill.family import FeatureObjective, pairs_of
from fused_lora.distill.models import build, read
from fused_lora.distill.recipe import Recipe, RecipeError
from fused_lora.distill.recipe.tables import Family
from fused_lora.distill.run import distill
from tests.distill.runs import MODEL, OPTIONS, checkpoint, recipe

SMALL = MODEL | {"options": OPTIONS | {"embed_dim": 8, "depth": 2, "num_classes": 0}}


def family(folder: Path, **tables: Any) -> Recipe:
    """A student of two blocks, half as wide as its teacher."""
    given: dict[str, Any] = {
        "teacher": {"checkpoint": checkpoint(folder)},
        "family": SMALL,
        "data": {"fraction": 0.2},
        "evaluate": {"cka": True, "knn": 3, "teacher": True},
    }
    for name, table in tables.items():
        given[name] = given.get(name, {}) | table
    return recipe(method="family", **given)


@pytest.mark.parametrize("distance", ["cosine", "l1"])
def test_the_loss_is_the_equation(distance: str) -> None:
    about = Family(model="m", distance=distance, on_class=2.0, on_patches=0.5)
    torch.manual_seed(0)
    student = build(Family(**SMALL)).double()
    objective = FeatureObjective(student, 16, [0, 1], about).double()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    wanted = [torch.randn(3, 5, 16, dtype=torch.float64) for _ in range(2)]
    found = objective(images, torch.zeros(3), wanted)
    total = torch.zeros((), dtype=torch.float64)
    for i, theirs in enumerate(wanted):
        mine = objective.projections[i](tokens_of(student, images).blocks[i])
        apart = (mine - theirs).abs().mean(-1)
        if distance == "cosine":
            apart = 1 - F.cosine_similarity(mine, theirs, dim=-1)
        total += (2.0 * apart[:, 0].mean() + 0.5 * apart[:, 1:].mean()) / 2
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-12)


def test_which_blocks_are_compared() -> None:
    assert pairs_of(3, 6, Family(model="m")) == [(2, 5)]
    mapped = Family(model="m", compared="mapped")
    assert pairs_of(3, 6, mapped) == [(0, 0), (1, 2), (2, 4), (2, 5)]
    last = Family(model="m", compared="mapped", mapping="last")
    assert pairs_of(3, 6, last) == [(0, 3), (1, 4), (2, 5)]


def test_a_family_learns_without_labels_and_slad_starts_from_it(tmp_path: Path) -> None:
    asked = family(tmp_path, train={"steps": 60, "precision": "fp64", "blr": 0.3})
    said = distill(asked, tmp_path / "runs" / "small")["figures"]
    lines = (tmp_path / "runs" / "small" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.7 * losses[0]
    assert set(json.loads(lines[0])) == {"step", "class", "patches", "loss", "lr"}
    assert {"knn", "cka", "teacher"} <= set(said) and "head" not in said
    torch.manual_seed(asked.train.seed)
    stranger = build(asked.family)
    student = load_student(tmp_path / "runs" / "small")
    assert not torch.equal(student.norm.weight.float(), stranger.norm.weight)
    assert not any(name.startswith("projections") for name, _ in student.named_parameters())

    teacher = f'[teacher]\ncheckpoint = "{checkpoint(tmp_path)}"\nmodel = "{MODEL["model"]}"\n'
    teacher += "[teacher.options]\n" + "".join(f"{k} = {v}\n" for k, v in OPTIONS.items())
    own = f'[family]\nmodel = "{SMALL["model"]}"\n[family.options]\n'
    own += "".join(f"{k} = {v}\n" for k, v in SMALL["options"].items())
    train = "[train]\nsteps = 3\nbatch_size = 16\n[evaluate]\nreport = false\n"
    (tmp_path / "kin.toml").write_text('method = "family"\n' + teacher + own + train)
    joint = recipe(
        method="slad",
        teacher={"checkpoint": checkpoint(tmp_path)},
        slad={"recipe": str(tmp_path / "kin.toml"), "head_blocks": 2},
        evaluate={"cka": True},
    )
    figures = distill(joint, tmp_path / "runs" / "joint")["figures"]
    made = load_student(tmp_path / "runs" / "kin")
    assert len(made.blocks) == 2 and made.embed_dim == 8
    assert set(figures["cka_before"]) == {"blocks.0", "blocks.1"}


def test_a_kept_teacher_is_the_teacher(tmp_path: Path) -> None:
    ends = []
    for cache in ("off", "memory"):
        tables = {"loss": {"cache": cache}, "train": {"precision": "fp64"}}
        distill(family(tmp_path, **tables), tmp_path / cache)
        ends.append(read(tmp_path / cache / "student.safetensors"))
    assert all(torch.allclose(v, ends[1][k], rtol=1e-9) for k, v in ends[0].items())


def test_what_cannot_be_a_family(tmp_path: Path) -> None:
    finer = {"options": SMALL["options"] | {"patch_size": 2}}
    with pytest.raises(RecipeError, match=r"family.model has \(1, 17\) .* teacher \(1, 5\)"):
        distill(family(tmp_path, family=finer), tmp_path / "finer")
    bare = family(tmp_path, teacher={"checkpoint": ""})
    with pytest.raises(RecipeError, match="teacher.model 'vit_tiny_patch16_224' has no weights"):
        distill(bare, tmp_path / "bare")
