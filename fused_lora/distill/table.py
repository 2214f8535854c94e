"""The figures of a run, for people."""

from __future__ import annotations

from typing import Any

COUNTS = ("images", "steps", "skipped")


def text(said: dict[str, Any]) -> str:
    """A few lines of what ``distill`` returned."""
    figures = dict(said["figures"])
    each, teacher = figures.pop("iou", {}), figures.pop("teacher", {})
    likeness = figures.pop("cosine", {}) | figures.pop("cka", {})
    lines = [f"{name:<10}{figures.pop(name):>8}" for name in COUNTS if name in figures]
    for name, value in figures.items():
        beside = f"   teacher {teacher[name]:.2%}" if name in teacher else ""
        lines.append(f"{name:<10}{value:>8.2%}{beside}")
    lines += [f"{'iou':<10}{_row(each)}"] if each else []
    lines += [f"{block:<10}{_row(row)}" for block, row in likeness.items()]
    return "\n".join([*lines, f"{'seconds':<10}{said['seconds']:>8}"])


def _row(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in row.items())
