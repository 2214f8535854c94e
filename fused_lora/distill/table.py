"""The figures of a run, for people."""

from __future__ import annotations

from statistics import mean
from typing import Any

COUNTS = ("images", "steps", "skipped")


def text(said: dict[str, Any]) -> str:
    """A few lines of what ``distill`` returned."""
    figures = dict(said["figures"])
    each, teacher = figures.pop("iou", {}), figures.pop("teacher", {})
    before, cka = figures.pop("cka_before", {}), figures.pop("cka", {})
    likeness = figures.pop("cosine", {}) | cka
    lines = [f"{name:<10}{figures.pop(name):>8}" for name in COUNTS if name in figures]
    for name, value in figures.items():
        beside = f"   teacher {teacher[name]:.2%}" if name in teacher else ""
        lines.append(f"{name:<10}{value:>8.2%}{beside}")
    lines += [f"{'iou':<10}{_row(each)}"] if each else []
    lines += [f"{block:<10}{_row(row)}" for block, row in likeness.items()]
    if cka:
        was = f", {mean_of(before):.3f} before" if before else ""
        lines.append(f"{'cka':<10}{mean_of(cka):.3f} mean of mapped blocks{was}")
    return "\n".join([*lines, f"{'seconds':<10}{said['seconds']:>8}"])


def mean_of(likeness: dict[str, dict[str, float]]) -> float:
    """The mean of all entries."""
    return mean(value for row in likeness.values() for value in row.values())


def _row(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in row.items())
