"""A grid of wecolora_grid.py as a picture: means over seeds, spread as bars.

    python recipes/plot_grid.py recipes/results/digits_grid.json recipes/results/digits_grid.svg

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from grid import Row
from wecolora_grid import TITLES

LOOKS = {
    "wecolora": ("#1f6f8b", "o"),
    "weco_kd": ("#c0532b", "s"),
    "first_kd": ("#8a6d1f", "^"),
    "lora_qv": ("#6b6b9c", "v"),
}


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    rows = [row for row in json.loads(args.rows.read_text())["rows"] if "rank" not in row]
    draw(rows, args.picture)


def draw(rows: list[Row], path: Path) -> None:
    """One panel per reduction: accuracy of the linear probe over the share of the data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fused_lora"
    from matplotlib import pyplot

    found: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for row in rows:
        found[row["method"], row["reduction"], row["fraction"]].append(100 * row["probe"])
    reductions = sorted({r for _, r, _ in found})
    fractions = sorted({f for m, _, f in found if m in LOOKS})
    wide = 3 * len(reductions)
    figure, panels = pyplot.subplots(1, len(reductions), figsize=(wide, 3), sharey=True)
    for panel, reduction in zip(panels, reductions, strict=True):
        for method, (colour, marker) in LOOKS.items():
            mine = {f: v for (m, r, f), v in sorted(found.items()) if (m, r) == (method, reduction)}
            if not mine:
                continue
            means = [mean(values) for values in mine.values()]
            spreads = [stdev(values) if len(values) > 1 else 0 for values in mine.values()]
            shares = [100 * fraction for fraction in mine]
            look = {"label": TITLES[method], "color": colour, "marker": marker, "capsize": 2}
            panel.errorbar(shares, means, spreads, **look)
        for value in found.get(("weco", reduction, min(fractions)), []):
            panel.axhline(value, color="grey", linestyle=":", label="copied, not trained")
        panel.set_title(f"every {reduction}. block kept", fontsize=9)
        panel.set_xscale("log")
        panel.set_xticks([100 * f for f in fractions], [f"{100 * f:g}" for f in fractions])
        panel.minorticks_off()
        panel.set_xlabel("% of the images")
    panels[0].set_ylabel("linear probe, %")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
