"""The memory guide's formula gives what was counted, and its table is the formula's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fused_lora.bench.shapes import SHAPES
from fused_lora.bench.suites import saved_bytes

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("make_memory", ROOT / "docs" / "make_memory.py")
make_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_memory)


@pytest.mark.parametrize("method", make_memory.UNITS)
def test_the_formula_is_what_was_counted(method):
    rows = [
        row
        for row in saved_bytes.newest(saved_bytes.read(ROOT / "benchmarks" / "results"))
        if (row.method, row.case.dtype, row.case.model) == (method, "bf16", "vit_base_patch16_224")
    ]
    assert {row.case.rank for row in rows} >= {16, 256}
    for row in rows:
        units = make_memory.units(method, row.case.rank, SHAPES[row.case.model].width)
        assert row.units_per_block == pytest.approx(units, abs=0.06)


def test_the_page_has_the_table():
    assert make_memory.table() in (ROOT / "docs" / "memory.md").read_text(), "run: make pictures"
