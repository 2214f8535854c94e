"""Rows survive the file, the newest wins, and the README's table settles at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fused_lora.bench import table
from fused_lora.bench.measure import _cases
from fused_lora.bench.provenance import provenance, slug
from fused_lora.bench.readme import BEGIN, END, OVERVIEW, measured, rewrite
from fused_lora.bench.rows import append, newest, read
from fused_lora.bench.shapes import grid
from tests.bench.samples import ORIGIN, row


def test_round_trip(tmp_path: Path) -> None:
    rows = [row("naive"), row("fused", peak_bytes=7)]
    (path,) = append(rows, tmp_path)
    assert path == tmp_path / "some-fast-processor" / "train_step.jsonl"
    append([row("peft")], tmp_path)
    assert list(read(tmp_path)) == [*rows, row("peft")]


def test_newest_row_of_a_cell_wins() -> None:
    later = replace(ORIGIN, commit="ffffffffffff", time_utc="2030-02-01T00:00:00Z")
    new = row(median_ms=100.0, provenance=later)
    assert newest([new, row(), row("naive")]) == [new, row("naive")]


def test_readme_is_written_between_its_markers_and_settles(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{BEGIN}\nold\n{END}\nafter\n")
    joint = row("fused_joint", form="joint", ratio_peft=0.5)
    append([row(), row("naive", saved_bytes=99_000_000), joint], tmp_path)
    assert rewrite(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("# before\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| 2 | 16 | 123 | 1.25 | 0.75 | 0.50 | 73 (99) | 5.0e-07 (4.0e-07) |" in text
    assert not rewrite(readme, tmp_path)
    assert readme.read_text() == text


def test_what_is_kept_stands_beside_naive_lora() -> None:
    kept = {"frozen": 50, "naive": 100, "peft": 102, "fused_block": 52, "fused_block_gemm": 20}
    said = table.kept([row(name, saved_bytes=mb * 10**6) for name, mb in kept.items()])
    heads, line = said.splitlines()
    assert "elementwise" in heads and "gemm" in heads and "checkpointed" in heads
    cells = line.split("  ")
    found = [cell.strip() for cell in cells if cell.strip()][1:]
    assert found == ["100 (1.00)", "102 (1.02)", "-", "-", "52 (0.52)", "20 (0.20)"]
    assert table.kept([row("frozen"), row("fused")]) == ""


def test_the_default_steps_on_a_cpu_are_of_few_images_and_of_eight() -> None:
    cases = list(_cases("train_step", grid("train_step", "cpu")))
    small = [(c.batch, c.rank) for c in cases if "small" in c.model]
    assert small == [(2, 16), (8, 16), (8, 256)]
    assert [(c.batch, c.rank) for c in cases if "base" in c.model] == [(1, 16)]


def test_readme_without_markers_is_named(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# nothing here\n")
    with pytest.raises(ValueError, match="README.md"):
        rewrite(readme, tmp_path)


def test_a_marker_without_its_end_is_named(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"# before\n{BEGIN}\n")
    with pytest.raises(ValueError, match="one of <!-- bench:begin -->"):
        rewrite(page, tmp_path)
    assert page.read_text() == f"# before\n{BEGIN}\n"


def test_the_overview_has_a_line_for_each_method_with_rows(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("\n".join(["# before", *OVERVIEW, "after\n"]))
    assert rewrite(page, tmp_path) and "No rows are recorded yet." in page.read_text()
    naive = row("naive", ratio_naive=1.0)
    case = replace(naive.case, suite="train_step", model="vit_small_patch16_224", batch=8, rank=16)
    append([replace(r, case=case) for r in (naive, row("fused_block", ratio_naive=0.75))], tmp_path)
    assert rewrite(page, tmp_path)
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[3] for line in lines] == ["1.00", "0.75"]
    assert page.read_text().endswith("after\n") and not rewrite(page, tmp_path)


def test_readme_without_rows_says_so(tmp_path: Path) -> None:
    assert measured(tmp_path) == "No rows are recorded yet."


def test_provenance_knows_its_versions() -> None:
    found = provenance("cpu")
    assert found.device and found.python and found.threads >= 1 and found.driver is None
    assert found.time_utc.endswith("Z")
    assert slug("AMD EPYC(tm) 7B13!") == "amd-epyc-tm-7b13"
