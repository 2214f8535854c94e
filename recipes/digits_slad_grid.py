"""SLAD against its ablations on the digits: methods, fractions, seeds; one JSON of all rows.

    python recipes/digits_slad_grid.py runs/slad_grid recipes/results/digits_slad_grid.json

The learning rate of each method is chosen first, on a seed of its own, by the student's accuracy on
training images that were not shown: no test image has a say. A run that is broken off goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from fused_lora.distill.recipe import read
from fused_lora.distill.run import run_of
from fused_lora.distill.slad_figures import accuracy
from fused_lora.distill.slad_run import SladRun
from fused_lora.distill.train.world import World
from fused_lora.version import __version__

RECIPE = Path(__file__).with_name("digits_slad.toml")
METHODS = ("joint", "two_step", "probe")
FRACTIONS = (0.10, 0.02)
SEEDS = (0, 1, 2)
STEPS = 600
RATES = (0.02, 0.08, 0.24)
SWEEP_FRACTION, SWEEP_SEED = 0.10, 9


def main() -> None:
    """The sweep, then the grid, one row at a time; then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("--only", choices=METHODS, help="the rows of one method")
    args = parser.parse_args()
    said = json.loads(args.out.read_text()) if args.out.is_file() else begin()
    for settings in every():
        if args.only not in (None, settings["method"]):
            continue
        kind = "sweep" if "blr" in settings else "rows"
        if any(row.items() >= settings.items() for row in said[kind]):
            continue
        given = settings | {"blr": settings.get("blr") or best(said["sweep"], settings["method"])}
        said[kind].append(given | row(args.folder, **given))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(said, indent=None).replace("}, {", "},\n{") + "\n")
        print(said[kind][-1], flush=True)
    print(table(said["rows"]))


def begin() -> dict[str, Any]:
    """What is known before the first row."""
    versions = {"fused_lora": __version__, "torch": torch.__version__}
    versions |= {"python": platform.python_version()}
    return {"recipe": RECIPE.name, "steps": STEPS, "versions": versions, "sweep": [], "rows": []}


def every() -> Iterator[dict[str, Any]]:
    """The sweep first; then the grid, a fraction of the data at a time."""
    for method, blr in product(METHODS, RATES):
        yield dict(method=method, fraction=SWEEP_FRACTION, seed=SWEEP_SEED, blr=blr)
    for fraction, seed, method in product(FRACTIONS, SEEDS, METHODS):
        yield dict(method=method, fraction=fraction, seed=seed)


def best(sweep: list[dict[str, Any]], method: str) -> float:
    """The rate whose student is best on images not shown."""
    mine = [row for row in sweep if row["method"] == method]
    return max(mine, key=lambda row: row["not_shown"])["blr"]


def row(folder: Path, method: str, fraction: float, seed: int, blr: float) -> dict[str, Any]:
    """One run, and what came of it."""
    given = {"slad.method": method, "data.fraction": fraction, "data.seed": seed}
    given |= {"train.seed": seed, "train.blr": blr, "train.steps": STEPS}
    recipe = read(RECIPE, [f"{key}={value}" for key, value in given.items()])
    run = run_of(recipe, folder / "-".join(map(str, given.values())), World())
    assert isinstance(run, SladRun)
    said = run.result()
    shown, figures = set(run.chosen()), said["figures"]
    rest = [i for i in range(len(run.images)) if i not in shown]
    held = accuracy(run.both.student, run.both.student_head, run.once(run.images, rest))
    likeness = mean(value for each in figures["cka"].values() for value in each.values())
    found = {"student": figures["head"], "teacher": figures["teacher"]["head"], "cka": likeness}
    found = {name: round(value, 5) for name, value in (found | {"not_shown": held}).items()}
    return found | {"images": figures["images"], "seconds": said["seconds"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| data | method | student | teacher | CKA |", "|---|---|---|---|---|"]
    for fraction, method in product(FRACTIONS, METHODS):
        mine = [r for r in rows if (r["fraction"], r["method"]) == (fraction, method)]
        if not mine:
            continue
        cells = [cell([100 * r[name] for r in mine], 1) for name in ("student", "teacher")]
        cells.append(cell([r["cka"] for r in mine], 2))
        lines.append(f"| {fraction:.0%} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float], digits: int) -> str:
    """Mean ± spread."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
