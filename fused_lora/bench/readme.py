"""The tables of README and docs/benchmarks.md, generated from recorded rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from fused_lora.bench import rows
from fused_lora.bench.compact import TITLES, comparisons, host_lines, markdown
from fused_lora.bench.overview import overview
from fused_lora.bench.plan_choice import rows as plan_rows
from fused_lora.bench.plan_choice.table import summary
from fused_lora.bench.rows import Row
from fused_lora.bench.saved_bytes import rows as saved_rows
from fused_lora.bench.saved_bytes.table import markdown_lines
from fused_lora.bench.sharing import rows as sharing_rows
from fused_lora.bench.sharing.table import markdown_lines as sharing_lines

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
    """Markdown: the races of each device, its choice of plans, sharing, what a block keeps."""
    races = sorted(rows.newest(rows.read(folder)), key=lambda row: row.provenance.device)
    parts: list[str] = []
    for device, group in groupby(races, key=lambda row: row.provenance.device):
        parts += _races(device, list(group))
    parts += _plans(folder)
    parts += sharing_lines(sharing_rows.newest(sharing_rows.read(folder)))
    parts += markdown_lines(saved_rows.newest(saved_rows.read(folder)))
    return "\n\n".join(parts) or "No rows are recorded yet."


def _races(device: str, group: Sequence[Row]) -> Iterator[str]:
    if host := host_lines(group):
        yield f"**{device}**, {TITLES['host']}, forward and backward:"
        yield host
    compared = [each for each in comparisons(group) if each.case.suite != "host"]
    for (title, dtype), lines in groupby(compared, key=lambda each: (each.title, each.dtype)):
        yield f"**{device}**, {title}, {dtype}:"
        yield markdown(list(lines))
    if compared:
        yield _foot(group)


def _plans(folder: Path) -> Iterator[str]:
    found = plan_rows.newest(plan_rows.read(folder))
    for device in sorted({row.provenance.device for row in found}):
        yield f"**{device}**, the choice of plan. " + summary(
            [row for row in found if row.provenance.device == device]
        )


def _foot(group: Sequence[Row]) -> str:
    origin = max((row.provenance for row in group), key=lambda found: found.time_utc)
    commits = ", ".join(sorted({row.provenance.commit for row in group}))
    return (
        f"Medians of {min(row.rounds for row in group)} or more interleaved rounds; "
        f"{origin.threads} threads, torch {origin.torch}, PEFT {origin.peft}, "
        f"timm {origin.timm}; commit {commits}; {origin.time_utc}."
    )
