"""What sharing costs as a table of the README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from fused_lora.bench.sharing.rows import SharingRow
from fused_lora.bench.table import milliseconds

NAMES = {
    "apart": "adapters of its own",
    "slices": "parts, by autograd's slices",
    "shared": "parts, by `share_adapters`",
}
HEADS = ("the student's adapters", "launches", "MB written", "ms", "x its own")


def markdown_lines(rows: Sequence[SharingRow]) -> Iterator[str]:
    """A sentence and a table for each device and case; nothing without rows."""
    ordered = sorted(rows, key=lambda row: (row.provenance.device, str(row.case)))
    for (device, case), group in groupby(ordered, key=lambda r: (r.provenance.device, r.case)):
        found = list(group)
        origin = found[0].provenance
        yield f"**{device}**, the joint step of a student that shares adapters, {case}:"
        yield _markdown(found)
        yield (
            f"{min(row.rounds for row in found)} interleaved rounds; launches are operations that "
            f"write memory; {origin.threads} threads, torch {origin.torch}; commit "
            f"{origin.commit}; {origin.time_utc}."
        )


def _markdown(rows: Sequence[SharingRow]) -> str:
    lines = [HEADS, ("---", *("---:",) * (len(HEADS) - 1))]
    by_way = {row.way: row for row in rows}
    for row in (by_way[way] for way in NAMES if way in by_way):
        written = f"{row.written_bytes / 1e6:.1f}"
        time = milliseconds(row.median_ms), f"{row.ratio_apart:.3f}"
        lines.append((NAMES[row.way], str(row.launches), written, *time))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
