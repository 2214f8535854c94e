"""What the grids share: rows that are written as they come, and paired differences."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from fused_lora.version import __version__

Row = dict[str, Any]


def fill(
    out: Path, about: Row, settings: Iterable[Row], run: Callable[[Row, list[Row]], Row]
) -> Row:
    """Run each of ``settings`` that ``out`` has no row of, and write each row at once.

    Args:
        out: the JSON file; one that is there goes on.
        about: what is known before the first row.
        settings: what a row is found by; those with a "blr" are the sweep of learning rates.
        run: the figures of a row, from its settings and the rows of the sweep so far.

    Returns:
        What the file holds.
    """
    result = json.loads(out.read_text()) if out.is_file() else begin(about)
    for given in settings:
        kind = "sweep" if "blr" in given else "rows"
        if any(row.items() >= given.items() for row in result[kind]):
            continue
        result[kind].append(given | run(given, result["sweep"]))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result).replace("}, {", "},\n{") + "\n")
        print(result[kind][-1], flush=True)
    return result


def begin(about: Row) -> Row:
    """A file without rows: what ran, where it came from."""
    versions = {"fused_lora": __version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return about | {"commit": found.stdout.strip(), "versions": versions, "sweep": [], "rows": []}


def paired(ours: list[float], others: list[float]) -> tuple[float, float, float]:
    """Mean of the differences of pairs and the ends of its 95 % interval by Student's t."""
    from scipy.stats import t

    apart = [a - b for a, b in zip(ours, others, strict=True)]
    half = t.ppf(0.975, len(apart) - 1) * stdev(apart) / sqrt(len(apart))
    return mean(apart), mean(apart) - half, mean(apart) + half


def compared(rows: list[Row], ours: Row, others: Row, figure: str, by: list[str]) -> str:
    """``paired`` in points over rows that agree on ``by``; "" where fewer than two pairs are."""
    sides = []
    for wanted in (ours, others):
        mine = [row for row in rows if row.items() >= wanted.items()]
        sides.append({tuple(row[key] for key in by): 100 * row[figure] for row in mine})
    both = sorted(sides[0].keys() & sides[1].keys())
    if len(both) < 2:
        return ""
    middle, low, high = paired(*([side[key] for key in both] for side in sides))
    won = sum(sides[0][key] > sides[1][key] for key in both)
    lost = sum(sides[0][key] < sides[1][key] for key in both)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f}), {won}:{lost}"


def cell(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else ""
