"""The grids in recipes/: what is run in which order, at whose rate; the tables of their rows."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from fused_lora.distill.models import build
from fused_lora.distill.recipe import read
from fused_lora.distill.recipe.tables import Teacher
from fused_lora.distill.run import distill
from tests.distill.runs import MODEL, OPTIONS, checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
RESULTS = RECIPES / "results"


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(RECIPES))
    names = ("grid", "slad_grid", "wecolora_grid")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        importlib.sys.modules.pop(name)


def tiny(module: ModuleType) -> Any:
    """A grid of one mapping, one fraction and two seeds."""
    about = replace(module.GRIDS["digits"], steps=2, swept={0.1: 0.1}, seeds=(0, 1))
    return replace(about, rates=(0.02, 0.04), beyond={}, mappings=("joint, last",))


def test_a_sweep_goes_before_what_it_is_for_and_methods_search_alike(grids: dict) -> None:
    module = grids["slad_grid"]
    for name, grid in module.GRIDS.items():
        rows = list(module.every(grid))
        sweep = [row for row in rows if "blr" in row]
        assert rows[: len(sweep)] == sweep and all(row["seed"] not in grid.seeds for row in sweep)
        for fraction in set(grid.swept.values()):
            beyond = [(key[1:], rates) for key, rates in grid.beyond.items() if key[0] == fraction]
            further = {key: 3 + len(rates) for key, rates in beyond}
            mine = [row for row in sweep if row["fraction"] == fraction]
            of = groupby(mine, key=lambda row: (row["method"], row["sweeps"]))
            counts = {key: len(list(group)) for key, group in of}
            assert counts == dict.fromkeys(counts, 3) | further and len(counts) == 7, name
        plain = [row for row in rows if "blr" not in row]
        methods = 4 + len(grid.mappings)
        assert len(plain) == methods * len(grid.swept) * len(grid.seeds)


def test_the_rate_of_a_phase_is_the_best_on_images_not_shown(grids: dict) -> None:
    module = grids["slad_grid"]
    grid = tiny(module)
    sweep = []
    for row in module.every(grid):
        if "blr" in row:
            shown = {"both_not_shown": 0.5, "teacher_not_shown": 0.5, "student_not_shown": 0.5}
            wins = {("joint, even", "both", 0.04), ("probe", "teacher", 0.16)}
            wins |= {("probe", "student", 0.02)}
            key = row["method"], row["sweeps"], row["blr"]
            shown[f"{row['sweeps']}_not_shown"] += 0.1 * (key in wins)
            sweep.append(row | shown)
    seed = {"fraction": 0.1, "seed": 0}
    assert module.rates(grid, seed | {"method": "joint, last"}, sweep) == (0.04, 0.04)
    assert module.rates(grid, seed | {"method": "probe"}, sweep) == (0.02, 0.16)
    asked = seed | {"method": "probe", "sweeps": "teacher", "blr": 0.08}
    assert module.rates(grid, asked, sweep) == (grid.rates[1], 0.08)
    asked = seed | {"method": "probe", "sweeps": "student", "blr": 0.04}
    assert module.rates(grid, asked, sweep) == (0.04, 0.16)


def test_a_row_is_run_once_and_never_again(grids: dict, tmp_path: Path) -> None:
    """SLAD's grid on a recipe of two steps, broken off and taken up."""
    module = grids["slad_grid"]
    weights = checkpoint(tmp_path)
    table = {"model": '"vit_tiny_patch16_224"', "checkpoint": f'"{weights}"'}
    lines = ['method = "slad"']
    for name, own in (("teacher", {}), ("slad", {"head_blocks": 2})):
        lines += [f"[{name}]", *(f"{k} = {v}" for k, v in (table | own).items())]
        lines += [f"[{name}.options]", *(f"{k} = {v}" for k, v in OPTIONS.items())]
    lines += ["[student]", "rank = 2", "[train]", "batch_size = 16", "[evaluate]", "cka = true"]
    (tmp_path / "tiny.toml").write_text("\n".join(lines))
    grid = replace(tiny(module), recipe=str(tmp_path / "tiny.toml"))
    asked = [row for row in module.every(grid) if row["method"] in ("joint, even", "two_step")]
    asked = [row for row in asked if row.get("blr", 0.04) == 0.04 and row["seed"] != 1]
    ran = []

    def run(given: dict, sweep: list[dict]) -> dict:
        ran.append(given)
        return module.row(grid, tmp_path / "runs", given, sweep)

    out = tmp_path / "rows.json"
    module.fill(out, {"recipe": "tiny.toml"}, asked[:2], run)
    result = module.fill(out, {}, asked, run)
    assert ran == asked and result == json.loads(out.read_text())
    assert [len(result[kind]) for kind in ("sweep", "rows")] == [3, 2]
    assert result["recipe"] == "tiny.toml"
    row = result["rows"][1]
    assert row["method"] == "two_step" and row["rate"] == row["teacher_rate"] == 0.04
    for name in ("student", "teacher", "student_not_shown", "teacher_not_shown", "both_not_shown"):
        assert 0 <= row[name] <= 1
    assert row["both_not_shown"] == pytest.approx(
        (row["student_not_shown"] + row["teacher_not_shown"]) / 2, abs=1e-5
    )
    assert module.tables(grid, result["rows"]).count("\n| 10% |") == 2


@pytest.mark.parametrize("method", ["joint", "probe"])
def test_slad_on_photographs_with_small_backbones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The recipe's own file; teacher and student are not trained first."""
    own = read(RECIPES / "photographs_slad.toml").data.classes
    for split, label in product(("train", "test"), (*own, "airplane")):
        home = tmp_path / "images" / split / label
        home.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 90, 20)).save(home / f"{i}.png")
    monkeypatch.setenv("PHOTOGRAPHS", str(tmp_path / "images"))
    asked = ["train.steps=2", "data.fraction=0.5", f"slad.method={method}", "student.rank=4"]
    for side, (width, depth) in {"teacher": (16, 4), "slad": (8, 3)}.items():
        table = MODEL | {"options": OPTIONS | dict(embed_dim=width, depth=depth, in_chans=3)}
        table["options"] |= dict(img_size=32, patch_size=16, num_classes=0)
        torch.manual_seed(0)
        weights = tmp_path / f"{side}.pth"
        torch.save(build(Teacher(**table)).state_dict(), weights)
        options = ", ".join(f"{key} = {value}" for key, value in table["options"].items())
        asked += [f"{side}.recipe=", f"{side}.model={table['model']}"]
        asked += [f"{side}.checkpoint={weights}", f"{side}.options={{{options}}}"]
    figures = distill(read(RECIPES / "photographs_slad.toml", asked), tmp_path / "run")["figures"]
    assert figures["images"] == 10 and figures["steps"] == (2 if method == "joint" else 4)
    assert set(figures["cka_before"]) == {"blocks.0", "blocks.1", "blocks.2"}


def test_paired_differences(grids: dict) -> None:
    """Against the formula: mean, and t(0.975, 2) = 4.303 of its standard error."""
    compared = grids["grid"].compared
    ours = {"method": "a"}
    rows = [{"method": "a", "seed": i, "f": f} for i, f in enumerate((0.50, 0.62, 0.71))]
    rows += [{"method": "b", "seed": i, "f": f} for i, f in enumerate((0.51, 0.60, 0.65))]
    apart = [-1.0, 2.0, 6.0]
    half = 4.3026527 * stdev(apart) / 3**0.5
    low, high = mean(apart) - half, mean(apart) + half
    wanted = f"{mean(apart):+.1f} ({low:+.1f} to {high:+.1f}), 2:1"
    assert compared(rows, ours, {"method": "b"}, "f", ["seed"]) == wanted
    assert compared(rows[:4], ours, {"method": "b"}, "f", ["seed"]) == ""  # one pair


def test_ranks_beside_the_plain_one(grids: dict) -> None:
    """A tuned rank takes the rate of its own sweep, and no other row does."""
    module = grids["wecolora_grid"]
    grid = module.GRIDS["photographs"]
    rows = list(module.every(grid))
    keys = [json.dumps(row, sort_keys=True) for row in rows]
    assert len(set(keys)) == len(keys)
    sweep = [row | {"distance": row["blr"]} for row in rows if "blr" in row]
    tuned = {"method": "wecolora", "fraction": 0.1, "reduction": 3, "seed": 0, "rank": 128}
    for row in sweep:
        if row.get("rank") == 128:
            row["distance"] = abs(row["blr"] - 0.05)
    assert module.best(grid, sweep, tuned | {"tuned": True}) == 0.05
    assert module.best(grid, sweep, tuned) == min(grid.rates["wecolora"])
    plain = {key: value for key, value in tuned.items() if key != "rank"}
    assert module.best(grid, sweep, plain) == min(grid.rates["wecolora"])
    own = [row for row in rows if row.get("tuned") and row.get("rank") == 128 and "blr" not in row]
    assert len(own) == len(grid.seeds) * len(grid.swept)


@pytest.mark.parametrize(
    ("module", "name", "file"),
    [
        ("slad_grid", "digits", "digits_slad_grid.json"),
        ("slad_grid", "photographs", "photographs_slad_grid.json"),
        ("wecolora_grid", "photographs", "photographs_grid.json"),
    ],
)
def test_the_committed_rows_are_those_of_the_grid(
    grids: dict, module: str, name: str, file: str
) -> None:
    """Each row is one that the grid asks for, once; and its recipe is in the folder."""
    here = grids[module]
    result = json.loads((RESULTS / file).read_text())
    asked = list(here.every(here.GRIDS[name]))
    for kind in ("sweep", "rows"):
        wanted = [given for given in asked if ("blr" in given) == (kind == "sweep")]
        found = [[g for g in wanted if row.items() >= g.items()] for row in result[kind]]
        assert all(found), f"{kind}: a row that nothing asks for"
        assert all(any(row.items() >= g.items() for row in result[kind]) for g in wanted)
    assert result["recipe"] == here.GRIDS[name].recipe
    assert read(RECIPES / result["recipe"]).method in ("slad", "wecolora")
    assert here.tables(here.GRIDS[name], result["rows"])
