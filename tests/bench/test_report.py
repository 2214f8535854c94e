"""The report stands alone and leaves nothing out."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

from fused_lora.bench.report import page
from fused_lora.bench.report.chart import ticks
from fused_lora.bench.rows import Refusal
from fused_lora.bench.table import cells, text
from tests.bench.samples import CASE, row

CASES = [
    row(name, median_ms=ms, case=replace(CASE, rank=rank))
    for rank in (16, 512)
    for name, ms in (("frozen", 100.5), ("naive", 151.5), ("fused", 111.5 + rank))
]


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = ("meta", "rect", "line", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_comes_from_outside() -> None:
    html = page(CASES)
    for outside in ("http:", "https:", "src=", "<link", "<script", "url(", "@import"):
        assert outside not in html


def test_every_row_is_there() -> None:
    html = page(CASES)
    for each in CASES:
        assert "".join(f"<td>{cell}</td>" for cell in cells(each)) in html


def test_plots_are_inline_and_tags_close() -> None:
    tags = Tags()
    tags.feed(page(CASES))
    assert tags.open == []
    assert tags.seen.count("svg") == 7  # the answer; time, memory, error at two ranks


def test_it_opens_with_the_answer() -> None:
    block = [replace(each, method="fused_block") for each in CASES if each.method == "fused"]
    html = page([*CASES, *block])
    said = "takes 0.75 of the time of naive LoRA and keeps 1.00 of its activations"
    assert html.index("<h1") < html.index(said) < html.index("<svg") < html.index("<h2")
    assert html.index("<h2") < html.index("How this was measured")
    assert "No case here" in page([each for each in CASES if each.method != "naive"])


def test_names_are_whole_and_lie_within_their_panels() -> None:
    """Every label begins and ends inside its drawing, and no two of a scatter share a place."""
    names = ("frozen", "naive", "peft", "peft_checkpoint", "fused_block_joint", "fused_block_gemm")
    html = page(
        [
            row(name, median_ms=100.0 + i % 2, saved_bytes=90_000_000 + i)
            for i, name in enumerate(names)
        ]
    )
    drawings = re.findall(r'<svg viewBox="0 0 (\d+) \d+".*?</svg>', html, re.DOTALL)
    for found in re.finditer(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', html, re.DOTALL):
        for x, end, said in re.findall(
            r'<text class="\w+" x="([-\d.]+)" y="[-\d.]+"(?: text-anchor="(\w+)")?>([^<]*)<',
            found[0],
        ):
            length = 6.6 * len(said)
            left = {"end": float(x) - length, "middle": float(x) - length / 2}.get(end, float(x))
            assert left >= -1 and left + length <= int(found[1]) + 1, (said, x)
    assert len(drawings) == 4
    scatter = html[html.index("<svg") : html.index("</svg>")]
    places = re.findall(r'class="value" x="([\d.]+)" y="([\d.]+)"', scatter)
    assert len(set(places)) == len(names)


def test_provenance_is_at_the_foot_and_escaped() -> None:
    html = page(CASES)
    assert escape(CASES[0].provenance.device) in html and "<Fast>" not in html
    assert html.rindex(CASES[0].provenance.commit) > html.rindex("<table")


def test_refusals_are_told() -> None:
    assert "error of y is 1, limit 0" in page(
        CASES, [Refusal(CASE, "peft", "error of y is 1, limit 0")]
    )


def test_a_report_of_nothing_still_opens() -> None:
    tags = Tags()
    tags.feed(page([]))
    assert tags.open == []


def test_text_table_aligns() -> None:
    lines = [line for line in text(CASES).splitlines() if line.startswith("  ")]
    assert len({len(line) for line in lines[:4]}) == 1


def test_ticks_are_few_round_and_below_the_end() -> None:
    for end in (0.0123, 0.999, 1.0, 5.3, 10.0, 528.6, 1815.0, 99999.0):
        found = ticks(end)
        assert 4 <= len(found) <= 9 and found[-1] < end, (end, found)
        assert all(len(f"{tick:.6g}".strip("0.").replace(".", "")) <= 2 for tick in found)
