"""What a finished run says: ``result.json``, a few lines of text, ``report.html``."""

from __future__ import annotations

import html
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.blocks import blocks_of
from fused_lora.distill.cka import comparable, layer_cka
from fused_lora.distill.data.batches import Batch
from fused_lora.distill.recipe.read import plain
from fused_lora.distill.recipe.tables import Recipe
from fused_lora.patching.report import PatchError

RESULT = "result.json"
TEACHER = "teacher"  # folder of a phase in which the teacher alone learns


def finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The result in ``folder``, if it is of this recipe."""
    result = read_result(folder)
    return result if result and result["recipe"] == json.loads(json.dumps(plain(recipe))) else None


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in ``folder``; None while there is none."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Put it there, whole or not at all."""
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / RESULT)


COUNTS = ("images", "steps", "skipped")


def text(result: dict[str, Any]) -> str:
    """A few lines of what ``distill`` returned."""
    figures = dict(result["figures"])
    each, teacher = figures.pop("iou", {}), figures.pop("teacher", {})
    before, cka = figures.pop("cka_before", {}), figures.pop("cka", {})
    likeness = figures.pop("cosine", {}) | cka
    lines = [f"{name:<10}{figures.pop(name):>8}" for name in COUNTS if name in figures]
    for name, value in figures.items():
        of_teacher = f"   teacher {teacher[name]:.2%}" if name in teacher else ""
        lines.append(f"{name:<10}{value:>8.2%}{of_teacher}")
    lines += [f"{'iou':<10}{_row(each)}"] if each else []
    lines += [f"{block:<10}{_row(row)}" for block, row in likeness.items()]
    if cka:
        was = f", {mean_of(before):.3f} before" if before else ""
        lines.append(f"{'cka':<10}{mean_of(cka):.3f} mean of mapped blocks{was}")
    return "\n".join([*lines, f"{'seconds':<10}{result['seconds']:>8}"])


def mean_of(likeness: dict[str, dict[str, float]]) -> float:
    """The mean of all entries."""
    return mean(value for row in likeness.values() for value in row.values())


def _row(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in row.items())


REPORT = "report.html"
MOST_IMAGES = 2000  # that the report looks at
Predict = Callable[[Tensor], Tensor]  # images to logits
ROUNDS, WARM_UPS = 7, 2


@dataclass(frozen=True)
class Cost:
    """What one model takes."""

    name: str
    parameters: int
    megabytes: float  # of parameters and buffers, each storage once
    batch_ms: float  # median time of a forward of ``images`` images
    images: int


@dataclass(frozen=True)
class Heat:
    """A table of numbers in [0, 1], with the names of rows and columns."""

    title: str
    rows: list[str]
    columns: list[str]
    values: Tensor  # [rows, columns]
    note: str = ""


def cost_of(name: str, model: nn.Module, images: Tensor) -> Cost:
    """Size of ``model``, and the time of its forward in eval mode without gradients."""
    training = model.training
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    times_ms = []
    model.eval()
    with torch.no_grad():
        for _ in range(WARM_UPS + ROUNDS):
            _settle(images)
            begun_s = time.perf_counter()
            model(images)
            _settle(images)
            times_ms.append(1e3 * (time.perf_counter() - begun_s))
    model.train(training)
    count = sum(p.numel() for p in model.parameters())
    middle_ms = median(times_ms[WARM_UPS:])
    return Cost(name, count, sum(storages.values()) / 2**20, middle_ms, len(images))


def _settle(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def likeness_of(teacher: nn.Module, student: nn.Module, batches: Iterator[Batch]) -> Heat | None:
    """CKA of every block with every block; None of models without transformer blocks."""
    try:
        rows, columns = ([b.name for b in blocks_of(model)] for model in (teacher, student))
    except PatchError:
        return None
    values = layer_cka(teacher, student, comparable(batches))
    note = "Class tokens of the test images; rows are the teacher's blocks, columns the student's."
    return Heat("CKA of the blocks", rows, columns, values, note)


def confusion_of(
    teacher: Predict, student: Predict, batches: Iterator[Batch], classes: list[str]
) -> Heat:
    """How often the student says each class where the teacher says another."""
    counts = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            theirs, mine = (each(batch.images).argmax(1).cpu() for each in (teacher, student))
            ones = torch.ones(len(mine), dtype=counts.dtype)
            counts.index_put_((theirs, mine), ones, accumulate=True)
    same = counts.trace().item() / counts.sum().item()
    note = (
        f"Rows are what the teacher says, columns what the student says of the same images, as "
        f"shares of the row; they agree on {same:.1%}."
    )
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return Heat("Student against teacher", classes, classes, shares, note)


def write(
    folder: Path, result: dict[str, Any], costs: list[Cost], heats: list[Heat], export: str
) -> Path:
    """Put the report of the result ``result`` beside it; loss curves come from ``log.jsonl``."""
    parts = [
        f"<h1>{html.escape(folder.name)}: {html.escape(result['recipe']['method'])}</h1>",
        _figures(result),
        *(_curve(path, title) for path, title in _logs(folder)),
        _costs(costs),
        *(_heat(heat) for heat in heats),
        f"<h2>Export</h2><p>{html.escape(export)}</p>",
        f"<h2>Recipe</h2><pre>{html.escape(json.dumps(result['recipe'], indent=1))}</pre>",
    ]
    path = folder / REPORT
    page = f"<!doctype html><meta charset='utf-8'><title>{html.escape(folder.name)}</title>"
    path.write_text(f"{page}<style>{STYLE}</style>{''.join(parts)}\n", encoding="utf-8")
    return path


STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;font-weight:normal}"
    "th{color:#555}tr>:first-child{text-align:left}.heat td{padding:.2em .45em;font-size:12px}"
    "pre{background:#f4f4f4;padding:1em;font-size:12px}svg{width:100%;height:auto}"
)


def _figures(result: dict[str, Any]) -> str:
    figures, teacher = result["figures"], result["figures"].get("teacher", {})
    rows = []
    for name, value in figures.items():
        if isinstance(value, float):
            of_teacher = f"{teacher[name]:.2%}" if isinstance(teacher.get(name), float) else ""
            rows.append((name, f"{value:.2%}", of_teacher))
        elif isinstance(value, int):
            rows.append((name, str(value), ""))
    rows.append(("seconds", f"{result['seconds']:.0f}", ""))
    return "<h2>Figures</h2>" + _table(("", "student", "teacher"), rows)


def _costs(costs: list[Cost]) -> str:
    if not costs:
        return ""
    rows = [
        (
            each.name,
            f"{each.parameters:,}",
            f"{each.megabytes:.2f}",
            f"{each.batch_ms:.2f}",
            f"{1e3 * each.images / each.batch_ms:.0f}",
        )
        for each in costs
    ]
    heads = ("", "parameters", "MiB", f"ms for {costs[0].images} images", "images/s")
    note = "<p>Median times of a forward on the machine of this run.</p>"
    return f"<h2>Size and latency</h2>{_table(heads, rows)}{note}"


def _logs(folder: Path) -> Iterator[tuple[Path, str]]:
    for home in sorted(path.parent for path in folder.glob("*/log.jsonl")):
        yield home / "log.jsonl", f"Loss of the phase {home.name}"
    if (folder / "log.jsonl").is_file():
        yield folder / "log.jsonl", "Loss"


def _curve(path: Path, title: str) -> str:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if len(points) < 2:
        return ""
    wide, high, pad = 600, 200, 45
    steps, losses = zip(*points, strict=True)
    low, top = min(losses), max(losses)
    across = max(steps) - min(steps) or 1
    span = top - low or 1
    places = " ".join(
        f"{pad + (wide - pad - 5) * (s - min(steps)) / across:.1f},"
        f"{5 + (high - 30) * (top - v) / span:.1f}"
        for s, v in points
    )
    return (
        f"<h2>{html.escape(title)}</h2><svg viewBox='0 0 {wide} {high}' font-size='11'>"
        f"<polyline points='{places}' fill='none' stroke='#1f6f8b' stroke-width='1.5'/>"
        f"<text x='0' y='14'>{top:.4g}</text><text x='0' y='{high - 25}'>{low:.4g}</text>"
        f"<text x='{pad}' y='{high - 5}'>step {min(steps)}</text>"
        f"<text x='{wide - 5}' y='{high - 5}' text-anchor='end'>step {max(steps)}</text></svg>"
    )


def _heat(heat: Heat) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *heat.columns])
    body = ""
    for name, row in zip(heat.rows, heat.values.tolist(), strict=True):
        cells = "".join(
            f"<td style='background:rgba(31,111,139,{min(max(v, 0), 1):.2f})'>{v:.2f}</td>"
            for v in row
        )
        body += f"<tr><th>{html.escape(name)}</th>{cells}</tr>"
    return (
        f"<h2>{html.escape(heat.title)}</h2><p>{html.escape(heat.note)}</p>"
        f"<table class='heat'><tr>{head}</tr>{body}</table>"
    )


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
