"""The report stands alone and leaves nothing out."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from html.parser import HTMLParser

from fused_lora.bench.report import page
from fused_lora.bench.rows import Refusal
from fused_lora.bench.table import cells, text
from tests.bench.samples import CASE, row

RACES = [
    row(name, median_ms=ms, case=replace(CASE, rank=rank))
    for rank in (16, 512)
    for name, ms in (("frozen", 100.5), ("naive", 151.5), ("fused", 111.5 + rank))
]


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = ("meta", "rect", "line")

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
    html = page(RACES)
    for outside in ("http:", "https:", "src=", "<link", "<script", "url(", "@import"):
        assert outside not in html


def test_every_row_is_there() -> None:
    html = page(RACES)
    for each in RACES:
        assert "".join(f"<td>{cell}</td>" for cell in cells(each)) in html


def test_plots_are_inline_and_tags_close() -> None:
    tags = Tags()
    tags.feed(page(RACES))
    assert tags.open == []
    assert tags.seen.count("svg") == 6  # time, memory, error at two ranks


def test_provenance_is_at_the_foot_and_escaped() -> None:
    html = page(RACES)
    assert escape(RACES[0].provenance.device) in html and "<Fast>" not in html
    assert html.rindex(RACES[0].provenance.commit) > html.rindex("<table")


def test_refusals_are_told() -> None:
    assert "error of y is 1, limit 0" in page(
        RACES, [Refusal(CASE, "peft", "error of y is 1, limit 0")]
    )


def test_a_report_of_nothing_still_opens() -> None:
    tags = Tags()
    tags.feed(page([]))
    assert tags.open == []


def test_text_table_aligns() -> None:
    lines = [line for line in text(RACES).splitlines() if line.startswith("  ")]
    assert len({len(line) for line in lines[:4]}) == 1
