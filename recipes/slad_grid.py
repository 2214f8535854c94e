"""SLAD against its ablations on the digits: methods, fractions, seeds; one JSON of all rows.

    python recipes/slad_grid.py runs/slad_grid recipes/results/digits_slad_grid.json

The learning rate of each method is chosen first, on a seed of its own, by the student's accuracy on
training images that were not shown: no test image has a say. A run that is broken off goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean

from grid import Row, cell, compared, fill

from fused_lora.distill.recipe import read
from fused_lora.distill.run import run_of
from fused_lora.distill.slad_figures import accuracy
from fused_lora.distill.slad_run import SladRun
from fused_lora.distill.train.world import World

RECIPE = Path(__file__).with_name("digits_slad.toml")
METHODS = {
    "joint, even": {"slad.method": "joint", "slad.mapping": "even"},
    "joint, first": {"slad.method": "joint", "slad.mapping": "first"},
    "joint, last": {"slad.method": "joint", "slad.mapping": "last"},
    "two_step": {"slad.method": "two_step"},
    "probe": {"slad.method": "probe"},
    "finetune": {"slad.method": "finetune"},
}
FRACTIONS = (0.02, 0.10, 0.50)
SEEDS = (0, 1, 2, 3, 4)
STEPS = 300
RATES = (0.04, 0.08, 0.16)
TEACHER_RATES = (0.02, 0.1, 0.5)  # x the rate above, of a teacher that is trained in full
SWEEP_FRACTION, SWEEP_SEED = 0.10, 9
FIGURES = ("student", "teacher")


def main() -> None:
    """The sweep, then the grid, one row at a time; then the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("--table", action="store_true", help="the tables of what is there, no runs")
    args = parser.parse_args()
    asked = iter(()) if args.table else every()
    about = {"recipe": RECIPE.name, "steps": STEPS}
    said = fill(args.out, about, asked, lambda given, sweep: row(args.folder, given, sweep))
    print(tables(said["rows"]))


def every() -> Iterator[Row]:
    """The sweep first; then the grid, seed by seed."""
    swept = dict(fraction=SWEEP_FRACTION, seed=SWEEP_SEED)
    for method, blr in product(("joint, even", "two_step", "probe"), RATES):
        yield dict(method=method, blr=blr, teacher_rate=1.0, **swept)
    for teacher_rate in TEACHER_RATES:  # its student learns as that of two_step
        yield dict(method="finetune", blr=0.0, teacher_rate=teacher_rate, **swept)
    for seed, fraction, method in product(SEEDS, FRACTIONS, METHODS):
        yield dict(method=method, fraction=fraction, seed=seed)


def best(sweep: list[Row], method: str, figure: str = "not_shown") -> Row:
    """The row of the sweep whose student is best on images not shown."""
    method = "joint, even" if method.startswith("joint") else method
    return max((row for row in sweep if row["method"] == method), key=lambda row: row[figure])


def rates(given: Row, sweep: list[Row]) -> tuple[float, float]:
    """(train.blr, slad.teacher_rate) of a row."""
    if given["method"] == "finetune":
        own = given.get("teacher_rate") or best(sweep, "finetune")["teacher_rate"]
        return best(sweep, "two_step")["blr"], own
    return given.get("blr") or best(sweep, given["method"])["blr"], 1.0


def row(folder: Path, given: Row, sweep: list[Row]) -> Row:
    """One run, and what came of it."""
    blr, teacher_rate = rates(given, sweep)
    settings = METHODS[given["method"]] | {
        "data.fraction": given["fraction"],
        "data.seed": given["seed"],
        "train.seed": given["seed"],
        "train.blr": blr,
        "slad.teacher_rate": teacher_rate,
        "train.steps": STEPS,
        "evaluate.report": "false",
    }
    recipe = read(RECIPE, [f"{key}={value}" for key, value in settings.items()])
    home = folder / "-".join(map(str, (given["method"].replace(", ", "_"), *settings.values())))
    run = run_of(recipe, home, World())
    assert isinstance(run, SladRun)
    begun_s = time.process_time()
    figures = run.result()["figures"]
    cpu_s = time.process_time() - begun_s
    shown = set(run.chosen())
    rest = [i for i in range(len(run.images)) if i not in shown]
    held = accuracy(run.both.student, run.both.student_head, run.once(run.images, rest))
    found = {"student": figures["head"], "teacher": figures["teacher"]["head"], "not_shown": held}
    for name in ("cka_before", "cka"):
        found[name] = mean(value for each in figures[name].values() for value in each.values())
    counted = {"images": figures["images"], "cpu_s": round(cpu_s, 2)}
    used = {"rate": blr, "used_teacher_rate": teacher_rate}
    return used | {name: round(value, 5) for name, value in found.items()} | counted


def tables(rows: list[Row]) -> str:
    """Markdown: mean and standard deviation over the seeds, then paired differences."""
    lines = ["| data | method | student | teacher | CKA before | CKA after |", "|---" * 6 + "|"]
    for fraction, method in product(FRACTIONS, METHODS):
        mine = [r for r in rows if (r["fraction"], r["method"]) == (fraction, method)]
        if mine:
            cells = [cell([100 * r[name] for r in mine]) for name in FIGURES]
            cells += [cell([r[name] for r in mine], 2) for name in ("cka_before", "cka")]
            lines.append(f"| {fraction:.0%} | {method} | {' | '.join(cells)} |")
    lines += ["", "| joint, even minus | figure | " + " | ".join(f"{f:.0%}" for f in FRACTIONS)]
    lines[-1] += " |"
    lines.append("|---" * (2 + len(FRACTIONS)) + "|")
    for other, figure in product([m for m in METHODS if m != "joint, even"], FIGURES):
        said = []
        for fraction in FRACTIONS:
            ours = {"method": "joint, even", "fraction": fraction}
            said.append(compared(rows, ours, ours | {"method": other}, figure, ["seed"]))
        lines.append(f"| {other} | {figure} | " + " | ".join(said) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
