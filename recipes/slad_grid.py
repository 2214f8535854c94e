"""SLAD against its ablations: methods, fractions, seeds; one JSON of all rows.

    python recipes/slad_grid.py digits runs/slad_grid recipes/results/digits_slad_grid.json
    PHOTOGRAPHS=photographs.tar.gz \\
    python recipes/slad_grid.py photographs runs/grid recipes/results/photographs_slad_grid.json

Learning rates are chosen first, on a seed of its own, by accuracy on training images that were not
shown: no test image has a say. Every phase has three to choose from, and more beyond the end of its
range where the best lies there: the joint step by the mean of teacher and student, a teacher's own
phase by the teacher, then the student's phase by the student.
A run that is broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from grid import Row, cell, compared, fill

from fused_lora.distill.recipe import read
from fused_lora.distill.run import run_of
from fused_lora.distill.slad_run import SladRun, accuracy
from fused_lora.distill.train.devices import World

METHODS = {
    "joint, even": {"slad.method": "joint", "slad.mapping": "even"},
    "joint, first": {"slad.method": "joint", "slad.mapping": "first"},
    "joint, last": {"slad.method": "joint", "slad.mapping": "last"},
    "two_step": {"slad.method": "two_step"},
    "probe": {"slad.method": "probe"},
    "finetune": {"slad.method": "finetune"},
}
JOINT = "joint, even"  # whose rate the other mappings go by
TWO_PHASES = ("two_step", "probe", "finetune")
SWEEP_SEED = 9
MOST_HELD = 1000  # images not shown, for the sweep
FIGURES = ("student", "teacher")
Rates = tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """What is run on one set of images."""

    recipe: str
    steps: int  # of each phase
    rates: Rates  # of the joint step, and of a student's own phase
    teacher_rates: dict[str, Rates]  # of a teacher's own phase
    swept: dict[float, float]  # fraction: the one whose sweep it goes by
    seeds: tuple[int, ...]
    beyond: dict[tuple[float, str, str], Rates]  # of a (fraction, method, sweeps) whose best was
    # the end of its range
    mappings: tuple[str, ...] = ()  # further ones of the joint step


DIGITS_RATES = (0.04, 0.08, 0.16)
GRIDS = {
    "digits": Grid(
        "digits_slad.toml",
        steps=300,
        rates=DIGITS_RATES,
        teacher_rates={
            "two_step": DIGITS_RATES,
            "probe": DIGITS_RATES,
            "finetune": (0.002, 0.008, 0.032),
        },
        swept={0.02: 0.10, 0.10: 0.10, 0.50: 0.10},
        seeds=(0, 1, 2, 3, 4),
        beyond={
            (0.10, "two_step", "teacher"): (0.02,),
            (0.10, "probe", "student"): (0.32,),
            (0.10, "finetune", "teacher"): (0.128,),
        },
        mappings=("joint, first", "joint, last"),
    ),
    "photographs": Grid(
        "photographs_slad.toml",
        steps=200,
        rates=(0.02, 0.04, 0.08),
        teacher_rates={
            "two_step": (0.02, 0.04, 0.08),
            "probe": (0.02, 0.04, 0.08),
            "finetune": (0.002, 0.008, 0.032),
        },
        swept={0.02: 0.02, 0.10: 0.10},
        seeds=(0, 1, 2),
        beyond={
            (0.02, JOINT, "both"): (0.01,),
            (0.02, "two_step", "student"): (0.16, 0.32),
            (0.10, "two_step", "student"): (0.16, 0.32),
            (0.10, "probe", "student"): (0.16,),
            (0.10, "finetune", "student"): (0.16, 0.32),
        },
    ),
}


def main() -> None:
    """The sweep, then the grid, one row at a time; then the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(GRIDS), help="which grid")
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("--table", action="store_true", help="the tables of what is there, no runs")
    args = parser.parse_args()
    grid = GRIDS[args.name]
    asked = iter(()) if args.table else every(grid)
    about = {"recipe": grid.recipe, "steps": grid.steps}
    result = fill(args.out, about, asked, lambda given, sweep: row(grid, args.folder, given, sweep))
    print(tables(grid, result["rows"]))


def every(grid: Grid) -> Iterator[Row]:
    """The sweep first; then the grid, seed by seed; then the other mappings."""
    phases = [(JOINT, "both", grid.rates)]
    for method in TWO_PHASES:
        phases.append((method, "teacher", grid.teacher_rates[method]))
        phases.append((method, "student", grid.rates))
    for fraction, (method, sweeps, own) in product(sorted(set(grid.swept.values())), phases):
        for blr in own + grid.beyond.get((fraction, method, sweeps), ()):
            about = dict(method=method, sweeps=sweeps, blr=blr)
            yield about | dict(fraction=fraction, seed=SWEEP_SEED)
    for methods in ((JOINT, *TWO_PHASES), grid.mappings):
        for seed, fraction, method in product(grid.seeds, grid.swept, methods):
            yield dict(method=method, fraction=fraction, seed=seed)


def best(sweep: list[Row], method: str, sweeps: str, fraction: float) -> float:
    """The rate that did best on images not shown."""
    wanted = {"method": method, "sweeps": sweeps, "fraction": fraction}
    mine = [row for row in sweep if row.items() >= wanted.items()]
    return max(mine, key=lambda row: row[f"{sweeps}_not_shown"])["blr"]


def rates(grid: Grid, given: Row, sweep: list[Row]) -> tuple[float, float]:
    """The learning rates of a row: of the student's phase, and of the teacher's."""
    method, sweeps = given["method"], given.get("sweeps")
    fraction = grid.swept[given["fraction"]]
    if method.startswith("joint"):
        rate = given.get("blr") or best(sweep, JOINT, "both", fraction)
        return rate, rate
    if sweeps == "teacher":
        return grid.rates[1], given["blr"]
    own = best(sweep, method, "teacher", fraction)
    return (given["blr"] if sweeps else best(sweep, method, "student", fraction)), own


def row(grid: Grid, folder: Path, given: Row, sweep: list[Row]) -> Row:
    """One run, and what came of it."""
    rate, own = rates(grid, given, sweep)
    settings = METHODS[given["method"]] | {
        "data.fraction": given["fraction"],
        "data.seed": given["seed"],
        "train.seed": given["seed"],
        "train.blr": rate,
        "slad.teacher_rate": own / rate,
        "train.steps": grid.steps,
        "evaluate.report": "false",
    }
    asked = [f"{key}={value}" for key, value in settings.items()]
    recipe = read(Path(__file__).parent / grid.recipe, asked)
    home = folder / "-".join(map(str, (given["method"].replace(", ", "_"), *settings.values())))
    run = run_of(recipe, home, World())
    assert isinstance(run, SladRun)
    begun_s = time.process_time()
    figures = run.result()["figures"]
    cpu_s = time.process_time() - begun_s
    shown = set(run.chosen())
    rest = [i for i in range(len(run.images)) if i not in shown]
    both, found = run.both, {"student": figures["head"], "teacher": figures["teacher"]["head"]}
    pairs = {
        "student": (both.student, both.student_head),
        "teacher": (both.teacher, both.teacher_head),
    }
    held = rest[:: max(1, len(rest) // MOST_HELD)]
    for side, (model, head) in pairs.items():
        found[f"{side}_not_shown"] = accuracy(model, head, run.once(run.images, held))
    found["both_not_shown"] = (found["student_not_shown"] + found["teacher_not_shown"]) / 2
    for name in ("cka_before", "cka"):
        found[name] = mean(value for each in figures[name].values() for value in each.values())
    counted = {"images": figures["images"], "cpu_s": round(cpu_s, 2)}
    used = {"rate": rate, "teacher_rate": own}
    return used | {name: round(value, 5) for name, value in found.items()} | counted


def tables(grid: Grid, rows: list[Row]) -> str:
    """Markdown: mean and standard deviation over the seeds, then paired differences."""
    lines = ["| data | method | student | teacher | CKA before | CKA after |", "|---" * 6 + "|"]
    for fraction, method in product(grid.swept, METHODS):
        mine = [r for r in rows if (r["fraction"], r["method"]) == (fraction, method)]
        if mine:
            cells = [cell([100 * r[name] for r in mine]) for name in FIGURES]
            cells += [cell([r[name] for r in mine], 2) for name in ("cka_before", "cka")]
            lines.append(f"| {fraction:.0%} | {method} | {' | '.join(cells)} |")
    heads = [f"{JOINT} minus", "figure", *(f"{f:.0%}" for f in grid.swept)]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for other, figure in product([m for m in METHODS if m != JOINT], FIGURES):
        result = []
        for fraction in grid.swept:
            ours = {"method": JOINT, "fraction": fraction}
            result.append(compared(rows, ours, ours | {"method": other}, figure, ["seed"]))
        if any(result):
            lines.append(f"| {other} | {figure} | " + " | ".join(result) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
