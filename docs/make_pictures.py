"""Draw docs/pictures: memory by method, step time by rank, the plan's map, a program as a timeline.

    python docs/make_pictures.py

All but the last are drawn from the rows in benchmarks/results, the timeline from estimates.
Needs matplotlib and timm.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import timm
import torch
from matplotlib.patches import Patch

import fused_lora
from fused_lora.bench import rows
from fused_lora.bench.suites import plan_choice_trial, saved_bytes
from fused_lora.ops.ceilings import ceilings
from fused_lora.patching.explain import estimate_of, programs_of
from fused_lora.programs import describe

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
STRATEGIES = {
    "separate": "#c9d3df",
    "bordered": "#f2a65a",
    "merge": "#8fb8de",
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


def plan_map() -> None:
    """Cells: the forward strategy of the fastest measured plan, its time over the frozen one."""
    newest = plan_choice_trial.newest(plan_choice_trial.read(RESULTS))
    found = [row for row in newest if row.by == "measure"]
    ranks = sorted({row.case.rank for row in found})
    linears = list(dict.fromkeys((row.case.m, row.case.k, row.case.n) for row in found))
    figure, axes = plt.subplots(figsize=(8, 6.5))
    for row in found:
        case, best = row.case, str(row.best).split("/")[0].rpartition(":")[2]
        x, y = ranks.index(case.rank), linears.index((case.m, case.k, case.n))
        axes.add_patch(plt.Rectangle((x, y), 0.96, 0.94, color=STRATEGIES[best]))
        axes.text(x + 0.48, y + 0.5, f"{row.over_frozen:.2f}", ha="center", va="center")
    axes.set_xlim(0, len(ranks))
    axes.set_ylim(len(linears), 0)
    axes.set_xticks([x + 0.48 for x in range(len(ranks))], map(str, ranks))
    names = [f"{m} x {k} -> {n}" for m, k, n in linears]
    axes.set_yticks([y + 0.5 for y in range(len(linears))], names)
    axes.set_xlabel("rank; in each cell the time of forward and backward, x frozen")
    shown = [Patch(color=colour, label=name) for name, colour in STRATEGIES.items()]
    figure.legend(handles=shown, loc="outside upper center", ncols=len(shown), frameon=False)
    save(figure, "plan_map.svg")


def timeline() -> None:
    """Bars: the calls of an MLP half's program, as wide as they take by the plan's estimates."""
    model = timm.create_model("vit_base_patch16_224", depth=1)
    fused_lora.patch(model, rank=16)
    (program,) = programs_of(model, "blocks.0.mlp", batch_size=8)
    estimate = estimate_of(ceilings(torch.device("cpu"), torch.float32))
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for y, calls in enumerate((program.calls, program.calls_back)):
        at = 0.0
        for call in calls:
            name, wide = describe.name_of(call), estimate(*describe.work(call)) / 1e3
            product = name in describe.PRODUCTS
            axes.barh(
                y, wide, left=at, color="#8fb8de" if product else "#f2a65a", edgecolor="white"
            )
            if wide > 20:
                axes.text(at + wide / 2, y, name, ha="center", va="center")
            at += wide
    axes.set_yticks([0, 1], ["forward", "backward"])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, estimated; products blue, passes over memory orange")
    save(figure, "timeline.svg")


if __name__ == "__main__":
    for draw in (memory, step_time, plan_map, timeline):
        draw()
