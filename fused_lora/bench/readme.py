"""The tables in README and docs, written from committed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fused_lora.bench import rows
from fused_lora.bench.rows import Row
from fused_lora.bench.suites import plan_choice_trial as plan_rows
from fused_lora.bench.suites import saved_bytes as saved_rows
from fused_lora.bench.suites import sharing as sharing_rows
from fused_lora.bench.suites.plan_choice import summary
from fused_lora.bench.suites.saved_bytes import markdown_lines
from fused_lora.bench.suites.sharing import markdown_lines as sharing_lines
from fused_lora.bench.table import TITLES, host_lines, markdown, markdown_table, ratio_rows

METHODS = {
    "frozen": "frozen network",
    "naive": "naive LoRA",
    "peft": "PEFT",
    "peft_checkpoint": "PEFT, checkpointed",
    "fused_block": "**`fused_lora.patch(model)`**",
    "fused_block_gemm": 'the same, `recompute="gemm"`',
}
HEADS = (
    "method",
    "kept for backward by a ViT-B block, [M, d] tensors",
    "host time of a step, x frozen",
    "CPU step, 8 images, r = 16, x naive",
    "r = 128",
    "CPU step, 2 images, r = 16, x naive",
    "error of y, bf16",
)


def overview(folder: Path) -> str:
    """Markdown of the table; every figure is of the newest row of its case below ``folder``."""
    steps = rows.newest(rows.read(folder))
    kept = saved_rows.newest(saved_rows.read(folder))
    vit_s = {"suite": "train_step", "model": "vit_small_patch16_224", "dtype": "fp32"}
    columns: list[Callable[[str], str]] = [
        _column(
            kept, "units_per_block", "{:.1f}", model="vit_base_patch16_224", rank=16, dtype="fp32"
        ),
        _column(steps, "ratio_frozen", "{:.2f}", suite="host", dtype="fp32"),
        _column(steps, "ratio_naive", "{:.2f}", **vit_s, batch=8, rank=16),
        _column(steps, "ratio_naive", "{:.2f}", **vit_s, batch=8, rank=128),
        _column(steps, "ratio_naive", "{:.2f}", **vit_s, batch=2, rank=16),
        _column(steps, "error", "{:.1e}", **{**vit_s, "dtype": "bf16"}, batch=2, rank=16),
    ]
    lines = []
    for method, title in METHODS.items():
        cells = [column(method) for column in columns]
        if set(cells) != {"-"}:
            lines.append((title, *cells))
    return markdown_table(HEADS, lines) if lines else "No rows are recorded yet."


def _column(found: Sequence[Any], value: str, form: str, **case: Any) -> Callable[[str], str]:
    """A cell of each method, of the rows whose case says so; a dash where there is none."""
    fitting = [row for row in found if all(getattr(row.case, k) == v for k, v in case.items())]
    of = {row.method: row for row in sorted(fitting, key=lambda row: row.provenance.time_utc)}

    def cell(method: str) -> str:
        row = of.get(method)
        number = row and (row.errors.get("y") if value == "error" else getattr(row, value))
        return form.format(number) if number else "-"

    return cell


BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"  # all tables
OVERVIEW = ("<!-- overview:begin -->", "<!-- overview:end -->")  # the one of all methods


def rewrite(page: Path, folder: Path) -> bool:
    """Put what ``folder`` holds between the markers of ``page``; whether that changed the file.

    Raises:
        ValueError: it has no markers, or one without the other.
    """
    text = page.read_text(encoding="utf-8")
    changed = text
    for (begin, end), made in (((BEGIN, END), measured), (OVERVIEW, overview)):
        if (begin in text) != (end in text):
            raise ValueError(f"{page} has one of {begin} and {end}, not both")
        if begin in text:
            head, _, rest = changed.partition(begin)
            changed = f"{head}{begin}\n{made(folder)}\n{end}{rest.partition(end)[2]}"
    if BEGIN not in text and OVERVIEW[0] not in text:
        raise ValueError(
            f"{page} has neither {BEGIN} ... {END} nor {OVERVIEW[0]} ... {OVERVIEW[1]}"
        )
    page.write_text(changed, encoding="utf-8")
    return changed != text


def measured(folder: Path) -> str:
    """Markdown: the steps of each device, its choice of plans, sharing, what a block keeps."""
    found = sorted(rows.newest(rows.read(folder)), key=lambda row: row.provenance.device)
    parts: list[str] = []
    for device, group in groupby(found, key=lambda row: row.provenance.device):
        parts += _steps(device, list(group))
    parts += _plans(folder)
    parts += sharing_lines(sharing_rows.newest(sharing_rows.read(folder)))
    parts += markdown_lines(saved_rows.newest(saved_rows.read(folder)))
    return "\n\n".join(parts) or "No rows are recorded yet."


def _steps(device: str, group: Sequence[Row]) -> Iterator[str]:
    if host := host_lines(group):
        yield f"**{device}**, {TITLES['host']}, forward and backward:"
        yield host
    compared = [each for each in ratio_rows(group) if each.case.suite != "host"]
    for (title, dtype), lines in groupby(compared, key=lambda each: (each.title, each.dtype)):
        yield f"**{device}**, {title}, {dtype}:"
        yield markdown(list(lines))
    if compared:
        yield _foot(group)


def _plans(folder: Path) -> Iterator[str]:
    found = plan_rows.newest(plan_rows.read(folder))
    for device, by in sorted({(row.provenance.device, row.by) for row in found}):
        rows_of = [row for row in found if (row.provenance.device, row.by) == (device, by)]
        yield f"**{device}**, plans chosen by `FUSED_LORA_PLAN={by}`. {summary(rows_of)}"


def _foot(group: Sequence[Row]) -> str:
    origin = max((row.provenance for row in group), key=lambda found: found.time_utc)
    commits = ", ".join(sorted({row.provenance.commit for row in group}))
    return (
        f"Medians of {min(row.rounds for row in group)} or more interleaved rounds; "
        f"{origin.threads} threads, torch {origin.torch}, PEFT {origin.peft}, "
        f"timm {origin.timm}; commit {commits}; {origin.time_utc}."
    )
