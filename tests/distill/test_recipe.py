"""Every key of a recipe is checked, and every file in recipes/ passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_lora.distill.recipe import RecipeError, read
from fused_lora.distill.recipe.read import of, plain

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))
TEACHER = {"model": "vit_base_patch16_224", "pretrained": True}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_repository_are_sound(path: Path) -> None:
    recipe = read(path)
    assert of(plain(recipe)) == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "weco"}, "a recipe has no key 'methods'; did you mean 'method'?"),
        ({"method": "weclora"}, "method must be one of .*, got 'weclora'"),
        ({"student": {"rnak": 4}}, r"\[student\] has no key 'rnak'; did you mean 'rank'?"),
        ({"student": {"zzz": 4}}, r"\[student\] has no key 'zzz'; its keys are \['reduction'"),
        ({"student": 3}, "student must be a table, got 3"),
        ({"student": {"reduction": 1}}, r"student.reduction must lie in \[2, 64\], got 1"),
        ({"student": {"rank": 2.0}}, "student.rank must be a whole number, got 2.0"),
        ({"student": {"rank": True}}, "student.rank must be a whole number, got True"),
        ({"student": {"trainable": "^head"}}, "trainable must be a list of strings, got '.head'"),
        ({"data": {"fraction": 1.5}}, r"data.fraction must lie in \[0, 1\], got 1.5"),
        ({"data": {"fraction": 0.0}}, "data.fraction must be above 0, got 0.0"),
        ({"data": {"fraction": "10%"}}, "data.fraction must be a number, got '10%'"),
        ({"data": {"source": "folder"}}, "data.path is for .* got source 'folder' and path ''"),
        ({"data": {"path": "x"}}, "data.path is for .* got source 'digits' and path 'x'"),
        ({"data": {"classes": "cat"}}, "data.classes must be a list of strings, got 'cat'"),
        (
            {"data": {"source": "digit_masks", "classes": ["3"]}},
            r"data.classes = \['3'\] is for labels, and data.source = 'digit_masks' has masks",
        ),
        ({"loss": {"tokens": 0, "labels": 0.0}}, "nothing to learn"),
        ({"loss": {"cache": True}}, "loss.cache must be a string, got True"),
        ({"train": {"blr": float("nan")}}, r"train.blr must lie in \[0, inf\], got nan"),
        ({"train": {"blr": float("inf")}}, "train.blr must lie .* got inf"),
        ({"train": {"epochs": 0}}, "train.epochs and train.steps are both 0"),
        ({"train": {"precision": "fp8"}}, "train.precision must be one of"),
        ({"train": {"parallel": "dp"}}, r"train.parallel must be one of \['ddp', 'fsdp2'\]"),
        ({"train": {"parallel": "fsdp2", "precision": "fp16"}}, "'fsdp2' goes with fp32, fp64"),
        ({"evaluate": {"head": 1}}, "evaluate.head must be a true or false, got 1"),
        ({"teacher": {"model": ""}}, "give teacher.model, or teacher.recipe"),
        ({"teacher": {"model": "a", "options": 3}}, "teacher.options must be a table, got 3"),
        (
            {"teacher": TEACHER | {"checkpoint": "x"}},
            r"from one place, got \['pretrained', 'checkpoint'\]",
        ),
        (
            {"loss": {"cache": "disk"}, "data": {"augment": "flip"}},
            "loss.cache = 'disk' keeps one view .* data.augment = 'flip'",
        ),
        ({"method": "slad"}, "the table .slad. goes with the method slad, not 'slad'"),
        ({"method": "family"}, "the table .family. goes with the method family, not 'family'"),
        ({"family": {"model": "m"}}, "the table .family. goes with .* not 'wecolora'"),
        (
            {"method": "family", "family": {"model": "m", "on_class": 0, "on_patches": 0.0}},
            "family.on_class and family.on_patches are both 0",
        ),
        ({"student": {"keep": "last"}}, "student.keep must be one of .*, got 'last'"),
        ({"evaluate": {"seen": 0.0}}, r"evaluate.seen must lie in \[0.001, 1\], got 0.0"),
        ({"slad": {"model": "m"}}, "the table .slad. goes with .* not 'wecolora'"),
        ({"slad": {"model": "m", "method": "both"}}, "slad.method must be one of .* got 'both'"),
        ({"slad": {"model": ""}}, "give slad.model, or slad.recipe"),
        ({"method": "finetune", "teacher": {"recipe": "x"}}, "trains the teacher itself"),
    ],
)
def test_refuses(given: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        of({"teacher": TEACHER} | given)


def test_overrides_and_files_beside_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[teacher]\nmodel = "m"\ncheckpoint = "w.pth"\n[train]\nsteps = 5\n')
    recipe = read(path, ["student.rank=64", "data.choice=kmeans++", "method=weco_kd"])
    assert (recipe.student.rank, recipe.data.choice, recipe.method) == (64, "kmeans++", "weco_kd")
    assert recipe.teacher.checkpoint == str(tmp_path / "w.pth") and recipe.train.steps == 5
    given = ["data.source=folder", "data.path=$PHOTOGRAPHS"]
    assert read(path, given).data.path == "$PHOTOGRAPHS"  # of the environment, not of the folder
    with pytest.raises(RecipeError, match="table.key=value, got 'rank'"):
        read(path, ["rank"])
    with pytest.raises(RecipeError, match="train.steps.more=1': steps is no table"):
        read(path, ["train.steps.more=1"])
    with pytest.raises(RecipeError, match=r"a.toml: student.rank must lie in"):
        read(path, ["student.rank=0"])


def test_refuses_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe '.*none.toml'"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("method = ")
    with pytest.raises(RecipeError, match="bad.toml is no TOML"):
        read(tmp_path / "bad.toml")
