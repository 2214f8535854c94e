"""SLAD against its ablations on the digits: methods, fractions, seeds; one JSON of all rows.

    python recipes/slad_grid.py runs/slad_grid recipes/results/digits_slad_grid.json

Learning rates are chosen first, on a seed of its own, by accuracy on training images that were not
shown: no test image has a say. Every phase has three to choose from: the joint step by the mean of
teacher and student, a teacher's own phase by the teacher, then the student's phase by the student.
A run that is broken off goes on where it stopped.
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
from fused_lora.distill.slad_run import SladRun, accuracy
from fused_lora.distill.train.devices import World

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
TEACHER_RATES = {"two_step": RATES, "probe": RATES, "finetune": (0.002, 0.008, 0.032)}
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
    result = fill(args.out, about, asked, lambda given, sweep: row(args.folder, given, sweep))
    print(tables(result["rows"]))


def every() -> Iterator[Row]:
    """The sweep first; then the grid, seed by seed; then the other mappings."""
    swept = dict(fraction=SWEEP_FRACTION, seed=SWEEP_SEED)
    for blr in RATES:
        yield dict(method="joint, even", sweeps="both", blr=blr, **swept)
    for method, own in TEACHER_RATES.items():
        for blr in own:
            yield dict(method=method, sweeps="teacher", blr=blr, **swept)
        for blr in RATES:
            yield dict(method=method, sweeps="student", blr=blr, **swept)
    others = ("joint, first", "joint, last")
    for methods in ([name for name in METHODS if name not in others], others):
        for seed, fraction, method in product(SEEDS, FRACTIONS, methods):
            yield dict(method=method, fraction=fraction, seed=seed)


def best(sweep: list[Row], method: str, sweeps: str) -> float:
    """The rate that did best on images not shown."""
    mine = [row for row in sweep if (row["method"], row["sweeps"]) == (method, sweeps)]
    return max(mine, key=lambda row: row[f"{sweeps}_not_shown"])["blr"]


def rates(given: Row, sweep: list[Row]) -> tuple[float, float]:
    """The learning rates of a row: of the student's phase, and of the teacher's."""
    method, sweeps = given["method"], given.get("sweeps")
    if method.startswith("joint"):
        rate = given.get("blr") or best(sweep, "joint, even", "both")
        return rate, rate
    if sweeps == "teacher":
        return RATES[1], given["blr"]
    own = best(sweep, method, "teacher")
    return (given["blr"] if sweeps else best(sweep, method, "student")), own


def row(folder: Path, given: Row, sweep: list[Row]) -> Row:
    """One run, and what came of it."""
    rate, own = rates(given, sweep)
    settings = METHODS[given["method"]] | {
        "data.fraction": given["fraction"],
        "data.seed": given["seed"],
        "train.seed": given["seed"],
        "train.blr": rate,
        "slad.teacher_rate": own / rate,
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
    both, found = run.both, {"student": figures["head"], "teacher": figures["teacher"]["head"]}
    pairs = {
        "student": (both.student, both.student_head),
        "teacher": (both.teacher, both.teacher_head),
    }
    for side, (model, head) in pairs.items():
        found[f"{side}_not_shown"] = accuracy(model, head, run.once(run.images, rest))
    found["both_not_shown"] = (found["student_not_shown"] + found["teacher_not_shown"]) / 2
    for name in ("cka_before", "cka"):
        found[name] = mean(value for each in figures[name].values() for value in each.values())
    counted = {"images": figures["images"], "cpu_s": round(cpu_s, 2)}
    used = {"rate": rate, "teacher_rate": own}
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
        result = []
        for fraction in FRACTIONS:
            ours = {"method": "joint, even", "fraction": fraction}
            result.append(compared(rows, ours, ours | {"method": other}, figure, ["seed"]))
        if any(result):
            lines.append(f"| {other} | {figure} | " + " | ".join(result) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
