"""The README's one table: what each method keeps, what it asks of the host, how long a step is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fused_lora.bench import rows
from fused_lora.bench.saved_bytes import rows as saved_rows

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
    raced = rows.newest(rows.read(folder))
    kept = saved_rows.newest(saved_rows.read(folder))
    vit_s = {"suite": "train_step", "model": "vit_small_patch16_224", "dtype": "fp32"}
    columns: list[Callable[[str], str]] = [
        _column(
            kept, "units_per_block", "{:.1f}", model="vit_base_patch16_224", rank=16, dtype="fp32"
        ),
        _column(raced, "ratio_frozen", "{:.2f}", suite="host", dtype="fp32"),
        _column(raced, "ratio_naive", "{:.2f}", **vit_s, batch=8, rank=16),
        _column(raced, "ratio_naive", "{:.2f}", **vit_s, batch=8, rank=128),
        _column(raced, "ratio_naive", "{:.2f}", **vit_s, batch=2, rank=16),
        _column(raced, "error", "{:.1e}", **{**vit_s, "dtype": "bf16"}, batch=2, rank=16),
    ]
    lines = [HEADS, ("---", *("---:",) * len(columns))]
    for method, said in METHODS.items():
        cells = [column(method) for column in columns]
        if set(cells) != {"-"}:
            lines.append((said, *cells))
    if len(lines) == 2:
        return "No rows are recorded yet."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _column(found: Sequence[Any], value: str, form: str, **case: Any) -> Callable[[str], str]:
    """A cell of each method, of the rows whose case says so; a dash where there is none."""
    fitting = [row for row in found if all(getattr(row.case, k) == v for k, v in case.items())]
    of = {row.contender: row for row in sorted(fitting, key=lambda row: row.provenance.time_utc)}

    def cell(method: str) -> str:
        row = of.get(method)
        number = row and (row.errors.get("y") if value == "error" else getattr(row, value))
        return form.format(number) if number else "-"

    return cell
