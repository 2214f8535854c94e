"""WeCoLoRA against WeCo+KD on the digits: fractions, reductions, seeds; one JSON of all rows.

    python recipes/digits_grid.py runs/grid recipes/results/digits_grid.json

The learning rate of each method is chosen first, at two fractions, by the distance of teacher
and student on training images that neither is shown: no label and no test image has a say. A run
that is broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fused_lora.distill.evaluate import token_distance
from fused_lora.distill.recipe import read
from fused_lora.distill.run import distill
from fused_lora.distill.runner import Run
from fused_lora.distill.student import load_student
from fused_lora.distill.train.world import World
from fused_lora.version import __version__

RECIPE = Path(__file__).with_name("digits_wecolora.toml")
METHODS = ("wecolora", "weco_kd")
FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.25)
REDUCTIONS = (2, 3, 4)
SEEDS = (0, 1, 2)
STEPS = 120
RATES = {"wecolora": (0.1, 0.2, 0.4, 0.8), "weco_kd": (0.01, 0.02, 0.04, 0.08, 0.16)}
SWEPT = {0.01: 0.01, 0.02: 0.10, 0.05: 0.10, 0.10: 0.10, 0.25: 0.10}  # by effective batch
SWEEP_REDUCTION, SWEEP_SEED = 3, 9


def main() -> None:
    """The sweep, then the grid, one row at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("out", type=Path, help="the JSON file")
    args = parser.parse_args()
    said = json.loads(args.out.read_text()) if args.out.is_file() else begin()
    for settings in every():
        kind = "sweep" if "blr" in settings else "rows"
        if any(row.items() >= settings.items() for row in said[kind]):
            continue
        blr = settings.get("blr") or best(said["sweep"], settings)
        said[kind].append(settings | {"blr": blr} | row(args.folder, blr, **settings))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(said, indent=None).replace("}, {", "},\n{") + "\n")
        print(said[kind][-1], flush=True)


def begin() -> dict[str, Any]:
    """What is known before the first row."""
    versions = {"fused_lora": __version__, "torch": torch.__version__}
    return {
        "recipe": RECIPE.name,
        "steps": STEPS,
        "versions": versions | {"python": platform.python_version()},
        "sweep": [],
        "rows": [],
    }


def every() -> Iterator[dict[str, Any]]:
    """The sweep first; then the grid, seed by seed, so that a part of it is a grid already."""
    for fraction, method in product(sorted(set(SWEPT.values())), METHODS):
        for blr in RATES[method]:
            yield {
                "method": method,
                "fraction": fraction,
                "reduction": SWEEP_REDUCTION,
                "seed": SWEEP_SEED,
                "blr": blr,
            }
    for seed, reduction, fraction in product(SEEDS, REDUCTIONS, FRACTIONS):
        for method in METHODS:
            yield dict(method=method, fraction=fraction, reduction=reduction, seed=seed)
    for reduction in REDUCTIONS:
        yield dict(method="weco", fraction=0.01, reduction=reduction, seed=0)


def best(sweep: list[dict[str, Any]], settings: dict[str, Any]) -> float:
    """The rate with the smallest distance on images not shown."""
    mine = [
        row
        for row in sweep
        if row["method"] == settings["method"] and row["fraction"] == SWEPT[settings["fraction"]]
    ]
    return min(mine, key=lambda row: row["distance"])["blr"] if mine else 0.1


def row(folder: Path, rate: float, **settings: Any) -> dict[str, Any]:
    """One run, and what came of it."""
    seed = settings["seed"]
    recipe = read(
        RECIPE,
        [
            f"method={settings['method']}",
            f"data.fraction={settings['fraction']}",
            f"data.seed={seed}",
            f"student.reduction={settings['reduction']}",
            f"train.seed={seed}",
            f"train.steps={STEPS}",
            f"train.blr={rate}",
            "evaluate.cosine=false",
            "evaluate.teacher=false",
        ],
    )
    home = folder / "-".join(str(value) for value in (*settings.values(), rate))
    said = distill(recipe, home)
    run = Run(recipe, home, World())
    shown = set(run.chosen())
    rest = [i for i in range(len(run.images)) if i not in shown]
    batches = run.once(run.images, rest)
    distance = token_distance(load_student(home), run.teacher, batches, settings["reduction"])
    figures = {name: round(value, 5) for name, value in said["figures"].items()}
    return figures | {"distance": round(distance, 5), "seconds": said["seconds"]}


if __name__ == "__main__":
    main()
