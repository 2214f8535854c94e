"""The page: heading, one section for each model, every row as a table, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from itertools import groupby

from fused_lora.bench.report import words
from fused_lora.bench.report.plots import error_plot, memory_plot, time_over_memory, time_plot
from fused_lora.bench.report.style import BARS, STYLE
from fused_lora.bench.rows import Case, Refusal, Row
from fused_lora.bench.table import HEADS, by_case, cells

DTYPES = {"fp32": "fp32", "bf16": "bf16", "amp": "bf16 autocast"}


def page(rows: Sequence[Row], refusals: Sequence[Refusal] = ()) -> str:
    """The whole report as one HTML document."""
    races = [group for _, group in by_case(rows)]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>What adapters cost</title><style>{STYLE}{BARS}</style></head><body>",
        "<h1>What adapters cost, beside the frozen network</h1>",
        *_answer(races),
        *_refused(refusals),
        *(_section(list(group)) for _, group in groupby(races, key=_network)),
        "<h2>Every row</h2>",
        _table(rows),
        words.HOW,
        "<h2>Where this was measured</h2>",
        *_provenance(rows),
        "</body></html>",
    ]
    return "\n".join(parts)


def _answer(races: Sequence[Sequence[Row]]) -> list[str]:
    """One sentence and one picture, of the race with the most methods, images and fewest ranks."""
    if not races:
        return []
    race = max(races, key=lambda rows: (len(rows), rows[0].case.batch, -rows[0].case.rank))
    return [
        f'<p class="answer">{escape(words.answer(race))}</p>',
        time_over_memory(race),
        '<p class="soft">Each point is a method; nearer to the lower left is better.</p>',
    ]


def _network(race: Sequence[Row]) -> tuple[str, str, int, str]:
    case = race[0].case
    return case.suite, case.model, case.batch, case.dtype


def _section(races: Sequence[Sequence[Row]]) -> str:
    case = races[0][0].case
    heading = f"{case.model}, {case.batch} images of {case.tokens} tokens, {DTYPES[case.dtype]}"
    parts = [
        f"<h2>{escape(heading)}</h2>",
        f'<p class="soft">What is timed: {words.STEPS.get(case.suite, escape(case.suite))}.</p>',
        *(f"<p>{escape(words.summary(race))}</p>" for race in races),
        "<h3>Time of a step</h3>",
        f'<p class="soft">{words.TIME}</p>',
        time_plot(races),
        "<h3>Kept for backward</h3>",
        f'<p class="soft">{words.MEMORY}</p>',
        memory_plot(races),
    ]
    if any(row.errors for race in races for row in race):
        parts += [
            "<h3>Error against float64</h3>",
            f'<p class="soft">{words.ERROR}</p>',
            error_plot(races),
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
        ours = ' class="ours"' if row.contender.startswith("fused") else ""
        yield f"<tr{ours}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(row))}</tr>"


def _refused(refusals: Sequence[Refusal]) -> list[str]:
    if not refusals:
        return []
    said = (f"<p>{escape(f'{r.contender} ({r.case}): {r.reason}')}</p>" for r in refusals)
    return ['<div class="refused"><h3>Refused: no time recorded</h3>', *said, "</div>"]


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
