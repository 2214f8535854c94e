"""A grid of wecolora_grid.py as a picture and a table: means over seeds, spread as bars.

    python recipes/plot_grid.py recipes/results/digits_grid.json recipes/results/digits_grid.svg

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LOOKS = {
    "wecolora": ("WeCoLoRA", "#1f6f8b", "o"),
    "weco_kd": ("WeCo+KD", "#c0532b", "s"),
}
FIGURES = {"probe": "linear probe", "knn": "k-NN", "head": "teacher's head"}
Cells = dict[tuple[str, int, float], list[float]]  # (method, reduction, fraction): by seed


def main() -> None:
    """Print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    said = json.loads(args.rows.read_text())
    for figure in FIGURES:
        print(table(said["rows"], figure))
    draw(said, args.picture)


def cells(rows: list[dict[str, Any]], figure: str) -> Cells:
    """The values of one figure by setting."""
    found: Cells = defaultdict(list)
    for row in rows:
        found[row["method"], row["reduction"], row["fraction"]].append(100 * row[figure])
    return found


def table(rows: list[dict[str, Any]], figure: str) -> str:
    """Markdown: mean and standard deviation over seeds."""
    found = cells(rows, figure)
    fractions = sorted({fraction for method, _, fraction in found if method in LOOKS})
    lines = [
        f"| {FIGURES[figure]} | " + " | ".join(f"{f:.0%}" for f in fractions) + " |",
        "|---" * (len(fractions) + 1) + "|",
    ]
    for reduction in sorted({r for _, r, _ in found}):
        for method, (title, _, _) in LOOKS.items():
            said = [words(found[method, reduction, f]) for f in fractions]
            lines.append(f"| {title}, r = {reduction} | " + " | ".join(said) + " |")
    return "\n".join(lines) + "\n"


def words(values: list[float]) -> str:
    """Mean ± spread of a cell."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" if values else ""


def draw(said: dict[str, Any], path: Path) -> None:
    """One panel per reduction: accuracy of the linear probe over the share of the data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fused_lora"
    from matplotlib import pyplot

    found = cells(said["rows"], "probe")
    reductions = sorted({r for _, r, _ in found})
    figure, panels = pyplot.subplots(1, len(reductions), figsize=(9, 3), sharey=True)
    for panel, reduction in zip(panels, reductions, strict=True):
        for method, (title, colour, marker) in LOOKS.items():
            mine = {f: v for (m, r, f), v in sorted(found.items()) if (m, r) == (method, reduction)}
            means = [mean(values) for values in mine.values()]
            spreads = [stdev(values) if len(values) > 1 else 0 for values in mine.values()]
            shares = [100 * fraction for fraction in mine]
            panel.errorbar(
                shares, means, spreads, label=title, color=colour, marker=marker, capsize=2
            )
        for value in found.get(("weco", reduction, 0.01), []):
            panel.axhline(value, color="grey", linestyle=":", label="copied, not trained")
        panel.set_title(f"every {reduction}. block kept", fontsize=9)
        panel.set_xscale("log")
        panel.set_xticks([1, 2, 5, 10, 25], ["1", "2", "5", "10", "25"])
        panel.set_xlabel("% of the digits")
    panels[0].set_ylabel("linear probe, %")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
