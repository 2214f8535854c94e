"""The sentences of the report."""

from __future__ import annotations

from collections.abc import Sequence

from fused_lora.bench.rows import Row
from fused_lora.bench.table import times, title

STEPS = {
    "train_step": "one training step: forward, loss, backward, and AdamW on what is trained",
    "wecolora_step": "one WeCoLoRA step: teacher forward, student forward and backward, AdamW",
    "six_projections": "the linear layers of one block alone, forward and backward",
}

TIME = "Median; in brackets, over the frozen network (dashed). Less is better."
MEMORY = "Activations held between forward and backward. Less is better."
ERROR = (
    "The worst of output (y) and gradients (da, db, dx), over naive LoRA's error of the same "
    "quantity. Past the dashed line, by more than a rounding, a time is refused."
)

HOW = """
<h2>How this was measured</h2>
<p>Every method begins from the same frozen weights and the same adapter values (scale 1). The
methods take turns within one process, the order rotated each round, so that a slow moment of the
machine is shared; times are medians over rounds, ratios are medians of the ratio within a
round.</p>
<p>Before a method is timed, its output and its adapter gradients are compared with a float64 run
of the same equations on the same batch, a model by its first two blocks: all four kinds of
projection, the very modules that are timed, under the same plans. A time is recorded only if
every error is at most twice that of naive LoRA in the same precision, plus one rounding.</p>
<p>The frozen network trains nothing, but its gradient still crosses every block: training any
adapter costs at least this. "Kept for backward" counts the unique storages that autograd holds
after the forward pass, apart from weights and the input. PEFT and the <i>joint</i> form put one
adapter on the fused qkv projection, the others three; compare like with like: fused with naive,
fused joint with PEFT.</p>
"""


def answer(rows: Sequence[Row]) -> str:
    """The report in one sentence: the default form of this library beside naive LoRA."""
    of = {row.contender: row for row in rows}
    ours, naive = of.get("fused_block") or of.get("fused"), of.get("naive")
    if ours is None or naive is None or ours.ratio_naive is None or not naive.saved_bytes:
        return "No race here has both naive LoRA and fused_lora."
    case, kept = ours.case, ours.saved_bytes / naive.saved_bytes
    return (
        f"A step with {title(ours.contender)} takes {times(ours.ratio_naive)} of the time of naive "
        f"LoRA and keeps {kept:.2f} of its activations ({case.model}, {case.batch} images, "
        f"rank {case.rank}, {case.dtype})."
    )


def summary(rows: Sequence[Row]) -> str:
    """What one race shows, in two sentences; ``rows`` are those of one case."""
    over = [
        f"{title(row.contender)} {times(row.ratio_frozen)}"
        for row in rows
        if row.ratio_frozen is not None and row.contender != "frozen"
    ]
    said = f"At rank {rows[0].case.rank}, over the frozen step: {'; '.join(over)}." if over else ""
    alike = [words for row in rows if (words := _alike(row))]
    return f"{said} Like with like, {' and '.join(alike)}." if alike else said


def _alike(row: Row) -> str | None:
    if row.contender == "fused" and row.ratio_naive is not None:
        return f"fused_lora takes {times(row.ratio_naive)} of the time of naive LoRA"
    if row.contender == "fused_joint" and row.ratio_peft is not None:
        return f"its joint form {times(row.ratio_peft)} of that of PEFT"
    return None
