"""Variants of WeCoLoRA on the digits beside the plain one: every block, labels, k-means++, joint.

python recipes/digits_variants.py runs/grid recipes/results/digits_variants.json
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from grid import cell
from wecolora_grid import GRIDS

from fused_lora.distill.recipe import read
from fused_lora.distill.run import distill

RECIPE, STEPS = Path(__file__).with_name(GRIDS["digits"].recipe), GRIDS["digits"].steps
VARIANTS = {
    "plain": [],
    "every block": ["loss.blocks=every"],
    "labels too": ["loss.labels=0.1", 'student.trainable=["^head"]'],
    "labels alone": ["loss.tokens=0", "loss.labels=1", 'student.trainable=["^head"]'],
    "k-means++": ["data.choice=kmeans++"],
    "joint qkv": ["student.qkv=joint"],
    "rank 4": ["student.rank=4"],
    "rank 48": ["student.rank=48"],
}
FRACTIONS = (0.02, 0.10)
REDUCTION, RATE = 3, 0.2
FIGURES = ("probe", "knn", "head")


def main() -> None:
    """One row per variant, fraction and seed; the table of their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("out", type=Path, help="the JSON file")
    args = parser.parse_args()
    rows = [
        row(args.folder, variant, fraction, seed)
        for variant, fraction, seed in product(VARIANTS, FRACTIONS, GRIDS["digits"].seeds)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"recipe": RECIPE.name, "steps": STEPS, "reduction": REDUCTION, "blr": RATE}
    result["rows"] = rows
    args.out.write_text(json.dumps(result).replace("}, {", "},\n{") + "\n")
    print(table(rows))


def row(folder: Path, variant: str, fraction: float, seed: int) -> dict[str, Any]:
    """One run."""
    recipe = read(
        RECIPE,
        [
            f"data.fraction={fraction}",
            f"data.seed={seed}",
            f"train.seed={seed}",
            f"student.reduction={REDUCTION}",
            f"train.steps={STEPS}",
            f"train.blr={RATE}",
            "evaluate.cosine=false",
            "evaluate.teacher=false",
            "evaluate.report=false",
            *VARIANTS[variant],
        ],
    )
    figures = distill(recipe, folder / f"{variant}-{fraction}-{seed}")["figures"]
    found = {name: round(figures[name], 5) for name in FIGURES}
    return {"variant": variant, "fraction": fraction, "seed": seed} | found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    heads = [f"{figure}, {fraction:.0%}" for fraction, figure in product(FRACTIONS, FIGURES)]
    lines = ["| variant | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for variant in VARIANTS:
        cells = []
        for fraction, figure in product(FRACTIONS, FIGURES):
            mine = [r for r in rows if (r["variant"], r["fraction"]) == (variant, fraction)]
            cells.append(cell([100 * r[figure] for r in mine]))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
