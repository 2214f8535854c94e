"""report.html: one page that opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from itertools import groupby

from fused_lora.bench.report.chart import error_plot, memory_plot, time_over_memory, time_plot
from fused_lora.bench.rows import Case, Refusal, Row
from fused_lora.bench.table import HEADS, by_case, cells, times, title

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d2430; --soft: #5b6573;
  --line: #d9dee5; --panel: #f6f8fa; --frozen: #98a2ae; --naive: #d9822b; --naive_joint: #e5ab72;
  --addmm: #3d9a6c; --peft: #9a5fc0; --peft_bf16: #bd96d6; --peft_checkpoint: #c7a4dd;
  --fused: #6aa5ea; --fused_joint: #94bff0; --fused_block: #1254a8; --fused_block_joint: #2f73c4;
  --fused_block_gemm: #0b8a8f; --full: #b94a48; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181e; --ink: #e4e8ee; --soft: #9aa5b3;
  --line: #2d3641; --panel: #1b2129; --frozen: #77828f; --naive: #e0944a; --naive_joint: #b8834f;
  --addmm: #4fae80; --peft: #b17fd4; --peft_bf16: #86629f; --peft_checkpoint: #76568c;
  --fused: #3a6ba8; --fused_joint: #2f5688; --fused_block: #6db0ff; --fused_block_joint: #4b95f0;
  --fused_block_gemm: #35b9be; --full: #d06a66; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 2rem 1.5rem 3rem; background: var(--ground);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 .2rem; }
p { max-width: 46rem; margin: .4rem 0; }
.soft, figcaption, dd { color: var(--soft); }
.panels { display: flex; flex-wrap: wrap; gap: .4rem 0; margin: .5rem 0; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg .heading { font-weight: 600; fill: var(--ink); font-size: 13px; }
svg .name { fill: var(--soft); } svg .value { fill: var(--ink); }
svg .mark { stroke: var(--ink); stroke-dasharray: 3 3; opacity: .55; }
svg .bar { fill: var(--soft); } svg .axis { stroke: var(--line); }
.answer { font-size: 1.15rem; max-width: 56rem; }
.scroll { overflow-x: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid var(--line); } tr.case th { padding-top: .9rem; }
tr.ours td { font-weight: 600; }
.refused { border-left: 4px solid var(--bad); padding: .3rem 1rem; background: var(--panel); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem;
  font-size: .88rem; } dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""

COLOURED = (
    *("frozen", "naive", "naive_joint", "addmm", "peft", "peft_bf16"),
    *("peft_checkpoint", "fused", "fused_joint", "full"),
    *("fused_block", "fused_block_joint", "fused_block_gemm"),
)

BARS = "\n".join(f"svg .bar.{name} {{ fill: var(--{name}); }}" for name in COLOURED)


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
    of = {row.method: row for row in rows}
    ours, naive = of.get("fused_block") or of.get("fused"), of.get("naive")
    if ours is None or naive is None or ours.ratio_naive is None or not naive.saved_bytes:
        return "No case here has both naive LoRA and fused_lora."
    case, kept = ours.case, ours.saved_bytes / naive.saved_bytes
    return (
        f"A step with {title(ours.method)} takes {times(ours.ratio_naive)} of the time of naive "
        f"LoRA and keeps {kept:.2f} of its activations ({case.model}, {case.batch} images, "
        f"rank {case.rank}, {case.dtype})."
    )


def summary(rows: Sequence[Row]) -> str:
    """What one case shows, in two sentences; ``rows`` are those of one case."""
    over = [
        f"{title(row.method)} {times(row.ratio_frozen)}"
        for row in rows
        if row.ratio_frozen is not None and row.method != "frozen"
    ]
    text = f"At rank {rows[0].case.rank}, over the frozen step: {'; '.join(over)}." if over else ""
    alike = [words for row in rows if (words := _alike(row))]
    return f"{text} Like with like, {' and '.join(alike)}." if alike else text


def _alike(row: Row) -> str | None:
    if row.method == "fused" and row.ratio_naive is not None:
        return f"fused_lora takes {times(row.ratio_naive)} of the time of naive LoRA"
    if row.method == "fused_joint" and row.ratio_peft is not None:
        return f"its joint form {times(row.ratio_peft)} of that of PEFT"
    return None


DTYPES = {"fp32": "fp32", "bf16": "bf16", "amp": "bf16 autocast"}


def page(rows: Sequence[Row], refusals: Sequence[Refusal] = ()) -> str:
    """The whole report as one HTML document."""
    cases = [group for _, group in by_case(rows)]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>What adapters cost</title><style>{STYLE}{BARS}</style></head><body>",
        "<h1>What adapters cost, beside the frozen network</h1>",
        *_answer(cases),
        *_refused(refusals),
        *(_section(list(group)) for _, group in groupby(cases, key=_network)),
        "<h2>Every row</h2>",
        _table(rows),
        HOW,
        "<h2>Where this was measured</h2>",
        *_provenance(rows),
        "</body></html>",
    ]
    return "\n".join(parts)


def _answer(cases: Sequence[Sequence[Row]]) -> list[str]:
    """One sentence and one picture, of the case with the most methods, images and fewest ranks."""
    if not cases:
        return []
    case_rows = max(cases, key=lambda rows: (len(rows), rows[0].case.batch, -rows[0].case.rank))
    return [
        f'<p class="answer">{escape(answer(case_rows))}</p>',
        time_over_memory(case_rows),
        '<p class="soft">Each point is a method; nearer to the lower left is better.</p>',
    ]


def _network(case_rows: Sequence[Row]) -> tuple[str, str, int, str]:
    case = case_rows[0].case
    return case.suite, case.model, case.batch, case.dtype


def _section(cases: Sequence[Sequence[Row]]) -> str:
    case = cases[0][0].case
    heading = f"{case.model}, {case.batch} images of {case.tokens} tokens, {DTYPES[case.dtype]}"
    parts = [
        f"<h2>{escape(heading)}</h2>",
        f'<p class="soft">What is timed: {STEPS.get(case.suite, escape(case.suite))}.</p>',
        *(f"<p>{escape(summary(case_rows))}</p>" for case_rows in cases),
        "<h3>Time of a step</h3>",
        f'<p class="soft">{TIME}</p>',
        time_plot(cases),
        "<h3>Kept for backward</h3>",
        f'<p class="soft">{MEMORY}</p>',
        memory_plot(cases),
    ]
    if any(row.errors for case_rows in cases for row in case_rows):
        parts += [
            "<h3>Error against float64</h3>",
            f'<p class="soft">{ERROR}</p>',
            error_plot(cases),
        ]
    return "\n".join(parts)


def _table(rows: Iterable[Row]) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    body = [line for case, group in by_case(rows) for line in _lines(case, group)]
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Every row">'
        f"<table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _lines(case: Case, rows: Iterable[Row]) -> Iterable[str]:
    heading = escape(f"{case.suite}: {case}")
    yield f'<tr class="case"><th colspan="{len(HEADS)}">{heading}</th></tr>'
    for row in rows:
        ours = ' class="ours"' if row.method.startswith("fused") else ""
        yield f"<tr{ours}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(row))}</tr>"


def _refused(refusals: Sequence[Refusal]) -> list[str]:
    if not refusals:
        return []
    text = (f"<p>{escape(f'{r.method} ({r.case}): {r.reason}')}</p>" for r in refusals)
    return ['<div class="refused"><h3>Refused: no time recorded</h3>', *text, "</div>"]


def _provenance(rows: Iterable[Row]) -> list[str]:
    origins = dict.fromkeys(row.provenance for row in rows)
    return [
        "<dl>"
        + "".join(
            f"<dt>{escape(field)}</dt><dd>{escape('-' if value is None else str(value))}</dd>"
            for field, value in asdict(origin).items()
        )
        + "</dl>"
        for origin in origins
    ]
