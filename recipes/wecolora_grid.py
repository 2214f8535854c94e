"""WeCoLoRA against its baselines: fractions, reductions, seeds; one JSON of all rows.

    python recipes/wecolora_grid.py digits runs/grid recipes/results/digits_grid.json
    PHOTOGRAPHS=photographs.tar.gz \\
    python recipes/wecolora_grid.py photographs runs/grid recipes/results/photographs_grid.json

The learning rate of each method is chosen first by the distance of teacher and student on training
images that neither is shown: no label and no test image has a say. A run that is broken off goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from grid import Row, cell, compared, fill

from fused_lora.distill.evaluate import token_distance
from fused_lora.distill.recipe import Recipe, read
from fused_lora.distill.run import Run, distill
from fused_lora.distill.student import load_student
from fused_lora.distill.train.devices import World

METHODS = {
    "wecolora": ["method=wecolora"],
    "weco_kd": ["method=weco_kd"],
    "first_kd": ["method=weco_kd", "student.keep=first"],
    "lora_qv": ["method=wecolora", 'student.targets=["q", "v"]'],
    "weco": ["method=weco"],
    "first": ["method=weco", "student.keep=first"],
    "random": ["method=wecolora", "data.choice=random"],
    "kmeans": ["method=wecolora", "data.choice=kmeans++"],
    "wecolora_labels": ["method=wecolora", "loss.labels=0.1", 'student.trainable=["^head"]'],
    "weco_kd_labels": ["method=weco_kd", "loss.labels=0.1"],
}
TITLES = {
    "wecolora": "WeCoLoRA",
    "weco_kd": "WeCo+KD",
    "first_kd": "TopPruning+KD",
    "lora_qv": "WeCo+LoRA (q, v)",
    "weco": "copy alone",
    "first": "first layers alone",
    "random": "WeCoLoRA, any images",
    "kmeans": "WeCoLoRA, k-means++",
    "wecolora_labels": "WeCoLoRA, labels too",
    "weco_kd_labels": "WeCo+KD, labels too",
}
UNTRAINED = ("weco", "first")
RATE_OF = {  # methods without a sweep of their own
    "random": "wecolora",
    "kmeans": "wecolora",
    "wecolora_labels": "wecolora",
    "weco_kd_labels": "weco_kd",
}
SWEEP_SEED = 9
MOST_HELD = 1000  # images not shown, for the distance
Rates = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Grid:
    """What is run on one set of images."""

    recipe: str
    steps: int
    rates: Rates  # of the methods that learn; of one rate there is no sweep
    swept: dict[float, float]  # fraction: the one whose sweep it goes by
    reductions: tuple[int, ...]
    untrained: tuple[str, ...] = ("weco",)
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep_reduction: int | None = 3  # None: each reduction has a sweep of its own
    ranks: tuple[int, ...] = ()  # further ranks of WeCoLoRA, at the rate of the plain one
    rank_rates: dict[int, tuple[float, ...]] = field(default_factory=dict)  # ranks that are also
    # run at a rate of their own
    plain_rank: int = 16
    rank_reduction: int = 3
    settings: tuple[str, ...] = ()
    cosine: bool = False  # record the likeness of blocks
    ours: str = "wecolora"  # what the others are subtracted from


GRIDS = {
    "digits": Grid(
        "digits_wecolora.toml",
        steps=120,
        rates={"wecolora": (0.1, 0.2, 0.4, 0.8), "weco_kd": (0.01, 0.02, 0.04, 0.08, 0.16)},
        swept={0.01: 0.01, 0.02: 0.10, 0.05: 0.10, 0.10: 0.10, 0.25: 0.10},  # by effective batch
        reductions=(2, 3, 4),
    ),
    "digits_deep": Grid(
        "digits_wecolora.toml",
        steps=120,
        rates={
            "wecolora": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
            "weco_kd": (0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
            "wecolora_labels": (),
            "weco_kd_labels": (),
        },
        swept={0.01: 0.01, 0.02: 0.10, 0.10: 0.10},
        reductions=(6, 8),
        sweep_reduction=None,
        settings=("teacher.recipe=digits_deep_teacher.toml",),
    ),
    "photographs": Grid(
        "photographs_wecolora.toml",
        steps=100,
        rates={
            "wecolora": (0.05, 0.1, 0.2, 0.4),
            "weco_kd": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
            "first_kd": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
            "lora_qv": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        },
        swept={0.01: 0.02, 0.02: 0.02, 0.10: 0.02, 0.05: 0.02},
        reductions=(2, 3, 4, 6),
        untrained=UNTRAINED,
        ranks=(4, 64, 128),
        rank_rates=dict.fromkeys((64, 128), (0.0125, 0.025, 0.05, 0.1)),
    ),
    "photographs_choice": Grid(
        "photographs_wecolora.toml",
        steps=100,
        rates={"wecolora": (0.2,), "random": (), "kmeans": ()},  # that of "photographs"
        swept={0.0025: 0.0025},
        reductions=(2, 3),
        untrained=(),
        ours="kmeans",
    ),
    "photographs_cosine": Grid(
        "photographs_wecolora.toml",
        steps=100,
        rates={"wecolora": (0.2,), "weco_kd": (0.04,)},  # those of "photographs"
        swept={0.02: 0.02},
        reductions=(2,),
        cosine=True,
    ),
}


def main() -> None:
    """The sweep, then the grid, one row at a time; then its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=GRIDS)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("--table", action="store_true", help="the tables of what is there, no runs")
    args = parser.parse_args()
    grid = GRIDS[args.name]
    about = {"recipe": grid.recipe, "steps": grid.steps, "settings": grid.settings}
    asked = iter(()) if args.table else every(grid)
    result = fill(args.out, about, asked, lambda given, sweep: row(grid, args.folder, given, sweep))
    print(tables(grid, result["rows"]))


def every(grid: Grid) -> Iterator[Row]:
    """The sweep first; then the grid, a fraction of the images at a time."""
    swept = (grid.sweep_reduction,) if grid.sweep_reduction else grid.reductions
    for reduction, fraction, method in product(swept, sorted(set(grid.swept.values())), grid.rates):
        rates = grid.rates[method]
        for blr in rates if len(rates) > 1 else ():
            yield {
                "method": method,
                "fraction": fraction,
                "reduction": reduction,
                "seed": SWEEP_SEED,
                "blr": blr,
            }
    for reduction, method in product(grid.reductions, grid.untrained):
        yield dict(method=method, fraction=min(grid.swept), reduction=reduction, seed=0)
    for fraction, seed, reduction, method in product(
        grid.swept, grid.seeds, grid.reductions, grid.rates
    ):
        yield dict(method=method, fraction=fraction, reduction=reduction, seed=seed)
    yield from further_ranks(grid)


def further_ranks(grid: Grid) -> Iterator[Row]:
    """At the rate of the plain one; then at their own, by a sweep of each."""
    about: Row = {"method": "wecolora", "reduction": grid.rank_reduction}
    for seed, rank, fraction in product(grid.seeds, grid.ranks, grid.swept):
        yield about | dict(fraction=fraction, seed=seed, rank=rank)
    about["tuned"] = True
    for rank, fraction in product(grid.rank_rates, sorted(set(grid.swept.values()))):
        for blr in grid.rank_rates[rank]:
            yield about | dict(fraction=fraction, seed=SWEEP_SEED, rank=rank, blr=blr)
    for seed, rank, fraction in product(grid.seeds, grid.rank_rates, grid.swept):
        yield about | dict(fraction=fraction, seed=seed, rank=rank)


def best(grid: Grid, sweep: list[Row], given: Row) -> float:
    """The rate with the smallest distance on images not shown."""
    method = RATE_OF.get(given["method"], given["method"])
    if len(rates := grid.rates.get(method, (0.1,))) == 1:  # or it does not learn
        return rates[0]
    wanted = {"method": method, "fraction": grid.swept[given["fraction"]]}
    wanted["reduction"] = grid.sweep_reduction or given["reduction"]
    rank = given["rank"] if given.get("tuned") else None
    mine = [r for r in sweep if r.items() >= wanted.items() and r.get("rank") == rank]
    return min(mine, key=lambda row: row["distance"])["blr"]


def row(grid: Grid, folder: Path, given: Row, sweep: list[Row]) -> Row:
    """One run, and what came of it."""
    blr, seed = given.get("blr") or best(grid, sweep, given), given["seed"]
    settings = {
        "data.fraction": given["fraction"],
        "data.seed": seed,
        "student.reduction": given["reduction"],
        "train.seed": seed,
        "train.steps": grid.steps,
        "train.blr": blr,
        "evaluate.cosine": str(grid.cosine).lower(),
        "evaluate.teacher": "false",
        "evaluate.report": "false",
    }
    if "rank" in given:
        settings |= {"student.rank": given["rank"], "student.allow_large_rank": "true"}
        settings["train.stop_above"] = 0  # a rate that is too large has a row as well
    asked = [f"{key}={value}" for key, value in settings.items()]
    asked += [*grid.settings, *METHODS[given["method"]]]
    recipe = read(Path(__file__).with_name(grid.recipe), asked)
    home = folder / "-".join(str(value) for value in (*given.values(), blr))
    begun_s = time.process_time()
    figures: dict[str, Any] = distill(recipe, home)["figures"]
    cpu_s = time.process_time() - begun_s
    found: Row = {k: round(v, 5) for k, v in figures.items() if not isinstance(v, dict)}
    if grid.cosine:
        found["cosine"] = {
            block: {name: round(value, 5) for name, value in row.items()}
            for block, row in figures["cosine"].items()
        }
    if "blr" in given:
        found["distance"] = distance(recipe, home)
    return {"blr": blr} | found | {"cpu_s": round(cpu_s, 2)}


def distance(recipe: Recipe, home: Path) -> float:
    """Of teacher and student, on training images that the student was not shown."""
    run = Run(recipe, home, World())
    shown = set(run.chosen())
    rest = [i for i in range(len(run.images)) if i not in shown]
    batches = run.once(run.images, rest[:: max(1, len(rest) // MOST_HELD)])
    reduction = recipe.student.reduction
    return round(token_distance(load_student(home), run.teacher, batches, reduction), 5)


def tables(grid: Grid, rows: list[Row]) -> str:
    """Markdown: each figure by method, and the paired differences."""
    plain = [row for row in rows if "rank" not in row]
    figures = [name for name in ("probe", "knn", "head") if rows and name in rows[0]]
    result = [cells(grid, plain, figure) for figure in figures]
    for other, figure in product(grid.rates, figures):
        if other != grid.ours and any(row["method"] == other for row in rows):
            result.append(differences(grid, plain, other, figure))
    if grid.cosine:
        result.append(likeness(grid, rows))
    if plain != rows:
        result.append(ranks(grid, rows))
    return "\n".join(result)


def lines_of(grid: Grid, title: str) -> list[str]:
    """The head of a table over the fractions."""
    heads = [title, *(f"{100 * fraction:g}%" for fraction in sorted(grid.swept))]
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]


def cells(grid: Grid, rows: list[Row], figure: str) -> str:
    """One table: mean ± standard deviation over the seeds."""
    lines = lines_of(grid, figure)
    for reduction, method in product(grid.reductions, TITLES):
        mine = [r for r in rows if (r["method"], r["reduction"]) == (method, reduction)]
        of = [[100 * r[figure] for r in mine if r["fraction"] == f] for f in sorted(grid.swept)]
        if any(of):
            result = " | ".join(cell(values) for values in of)
            lines.append(f"| {TITLES[method]}, r = {reduction} | {result} |")
    return "\n".join(lines) + "\n"


def differences(grid: Grid, rows: list[Row], other: str, figure: str) -> str:
    """Ours minus another method: points, 95 % interval, pairs won and lost."""
    lines = lines_of(grid, f"{TITLES[grid.ours]} minus {TITLES[other]}, {figure}")
    by = ["seed", "reduction"]
    for reduction in (*grid.reductions, None):
        mine = [r for r in rows if reduction in (None, r["reduction"])]
        result = []
        for fraction in sorted(grid.swept):
            ours = {"method": grid.ours, "fraction": fraction}
            result.append(compared(mine, ours, ours | {"method": other}, figure, by))
        title = f"r = {reduction}" if reduction else "every r"
        lines.append(f"| {title} | " + " | ".join(result) + " |")
    return "\n".join(lines) + "\n"


def likeness(grid: Grid, rows: list[Row]) -> str:
    """Mean cosine of each block with the kept and the last skipped one, by method."""
    methods = [*grid.untrained, *grid.rates]
    heads = [f"{TITLES[method]}: kept, skipped" for method in methods]
    lines = ["| block | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for block in (*rows[0]["cosine"], "mean"):
        result = []
        for method in methods:
            mine = [ends(row["cosine"], block) for row in rows if row["method"] == method]
            result.append(", ".join(cell(list(side), 3) for side in zip(*mine, strict=True)))
        lines.append(f"| {block} | " + " | ".join(result) + " |")
    return "\n".join(lines) + "\n"


def ends(cosine: dict[str, dict[str, float]], block: str) -> tuple[float, float]:
    """The first and last entry of a block's row, or the means of all blocks' "mean"."""
    found = [list(row.values()) for name, row in cosine.items() if block in (name, "mean")]
    return mean(row[0] for row in found), mean(row[-1] for row in found)


def ranks(grid: Grid, rows: list[Row]) -> str:
    """WeCoLoRA by rank, at one reduction: at the plain one's rate, then at a rate of its own."""
    lines = lines_of(grid, "probe, by rank")
    wanted = {"method": "wecolora", "reduction": grid.rank_reduction}
    plain = {"rank": grid.plain_rank, "tuned": False}
    mine = [plain | row for row in rows if row.items() >= wanted.items()]
    asked = [plain | {"rank": rank} for rank in sorted((grid.plain_rank, *grid.ranks))]
    asked += [{"rank": rank, "tuned": True} for rank in grid.rank_rates]
    for about in asked:
        of = [row for row in mine if row.items() >= about.items()]
        result = [
            cell([100 * r["probe"] for r in of if r["fraction"] == f]) for f in sorted(grid.swept)
        ]
        rate = ", ".join(f"{blr:g}" for blr in sorted({r["blr"] for r in of}))
        lines.append(f"| {about['rank']}, rate {rate} | " + " | ".join(result) + " |")
    lines += ["", *lines_of(grid, f"minus rank {grid.plain_rank}, each at its own rate")]
    for rank, figure in product(grid.rank_rates, ("probe", "head")):
        result = []
        for fraction in sorted(grid.swept):
            here = [row for row in mine if row["fraction"] == fraction]
            own = {"rank": rank, "tuned": True}
            result.append(compared(here, own, plain, figure, ["seed"]))
        lines.append(f"| {rank}, {figure} | " + " | ".join(result) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
