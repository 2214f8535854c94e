"""Draw docs/pictures: memory by method, step time by rank, the plan's map, a program as a timeline.

    python docs/make_pictures.py

The first two are drawn from the rows in benchmarks/results; the map from the cost model on a device
of its table; the timeline from a program's estimates. Needs matplotlib and timm.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from fused_lora.bench import rows
from fused_lora.bench.suites import saved_bytes

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "fused_lora", "font.size": 11, "axes.spines.top": False}
matplotlib.rcParams |= {"axes.spines.right": False, "figure.constrained_layout.use": True}

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
METHODS = {  # name in the rows: name for a reader, colour
    "frozen": ("frozen network", "#7a8798"),
    "naive": ("naive LoRA", "#c1666b"),
    "peft": ("PEFT", "#d4a24c"),
    "peft_checkpoint": ("PEFT, checkpointed", "#e2c792"),
    "fused": ("fused_lora, linear level", "#8fb8de"),
    "fused_block": ("fused_lora.patch(model)", "#2f6690"),
    "fused_block_gemm": ('the same, recompute="gemm"', "#16425b"),
}


def save(figure: plt.Figure, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / name, metadata={"Date": None})
    plt.close(figure)


def memory() -> None:
    """Bars: what a block of ViT-B keeps, rank 16."""
    found = {
        row.method: row.units_per_block
        for row in saved_bytes.newest(saved_bytes.read(RESULTS))
        if row.case.model == "vit_base_patch16_224"
        and (row.case.rank, row.case.dtype) == (16, "fp32")
    }
    names = [name for name in METHODS if name in found]
    figure, axes = plt.subplots(figsize=(8, 3))
    labels, colours = zip(*(METHODS[name] for name in names), strict=True)
    bars = axes.barh(labels, [found[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("[M, d] tensors kept by a block of ViT-B at rank 16")
    save(figure, "memory.svg")


def step_time() -> None:
    """Lines: a training step of ViT-S on two images, over the rank."""
    at: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows.newest(rows.read(RESULTS)):
        case = row.case
        wanted = ("train_step", "vit_small_patch16_224", 2, "fp32")
        if (case.suite, case.model, case.batch, case.dtype) == wanted:
            at[row.method][case.rank] = row.ratio_frozen
    figure, axes = plt.subplots(figsize=(8, 4))
    for name in ("naive", "peft", "fused", "fused_block"):
        points = sorted(at[name].items())
        label, colour = METHODS[name]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.axhline(1.0, color=METHODS["frozen"][1], linestyle="--", label="frozen network")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank")
    axes.set_ylabel("step time, x frozen")
    axes.set_ylim(bottom=0.9)
    ranks = sorted({rank for found in at.values() for rank in found})
    axes.set_xticks(ranks, map(str, ranks))
    axes.legend(frameon=False)
    save(figure, "step_time.svg")


if __name__ == "__main__":
    memory()
    step_time()
