"""The command line: wrong values are named, and a small run leaves its files behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_lora.bench import main
from fused_lora.bench.measure import METHODS, able
from fused_lora.bench.rows import read
from fused_lora.bench.shapes import SHAPES, ModelShape


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--models", "vit_huge"], "'vit_huge'"),
        (["--ranks", "16,0"], "'0'"),
        (["--ranks", "x"], "'x'"),
        (["--dtype", "fp8"], "'fp8'"),
        (["--methods", "frozen,magic"], "'magic'"),
        (["--budget-seconds", "-1"], "'-1'"),
        (["--device", "abacus"], "'abacus'"),
        (["--suite", "none"], "'none'"),
        (["--out", "no/such/folder/report.html"], "no/such/folder"),
        (["--readme", "no-readme.md"], "'no-readme.md'"),
    ],
)
def test_wrong_values_are_named(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert named in capsys.readouterr().err


def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float) -> int:
    monkeypatch.setitem(SHAPES, "vit_small_patch16_224", ModelShape("tiny", 24, 5))
    monkeypatch.setattr("fused_lora.bench.correctness_gate.limit", lambda naive, dtype: limit)
    return main(
        [
            *("--suite", "six_projections", "--models", "vit_small_patch16_224", "--ranks", "2,4"),
            *("--batch", "2", "--methods", "frozen,naive,addmm", "--budget-seconds", "0.1"),
            *("--device", "cpu", "--out", str(tmp_path / "r.html"), "--rows", str(tmp_path)),
        ]
    )


def test_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run(tmp_path, monkeypatch, limit=1.0) == 0
    rows = list(read(tmp_path))
    assert [(row.case.rank, row.method) for row in rows] == [
        (rank, name) for rank in (2, 4) for name in ("frozen", "naive", "addmm")
    ]
    said = capsys.readouterr()
    assert "x frozen" in said.out and "[2/2]" in said.err
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_a_refused_row_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_run(tmp_path, monkeypatch, limit=-1.0) == 1
    assert {row.method for row in read(tmp_path)} == {"frozen"}


def test_methods_that_cannot_run_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert able(["frozen", "peft_bf16"], "fp32") == [METHODS["frozen"]]
    assert "peft_bf16" in capsys.readouterr().err
