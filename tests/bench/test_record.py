"""record.sh takes its whole road on a CPU; what it does stands in files, whenever it is cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_lora.bench.rows import read

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "record.sh"
PREPARED = ["build", "environment", "prepare-six", "prepare-train"]
TIMED = ["six-graph", "six-eager", "train-step"]
AFTER = ["cuda-checks", "triton-checks", "gpu-tests", "grid", "plan-choice", "tune", "sanitize"]
ORDER = [*PREPARED, *TIMED, *AFTER]

# What stands for Python: it writes a row at a time, and keeps what is prepared where it is kept.
STUB = """#!{python}
import json, os, sys, time
from pathlib import Path

words, out = sys.argv[1:], Path(os.environ["OUT"])
said = " ".join(words)
with (out / "calls.txt").open("a") as file:
    file.write(said + "\\n")

def keep(name):
    path = Path(os.environ["FUSED_LORA_CACHE_DIR"]) / "plans.json"
    path.parent.mkdir(exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else {{}}
    path.write_text(json.dumps(rows | {{name: 1}}, indent=1))

def value(flag):
    return words[words.index(flag) + 1]

if "benchmarks/summary.py" in said:
    print("what was recorded")
elif "--prepare" in words:
    keep(value("--suite"))
elif "--rows" in words:
    if os.environ.get("ANEW") == value("--suite"):
        keep("anew")
    path = Path(value("--rows")) / "a device" / (value("--suite") + ".jsonl")
    path.parent.mkdir(exist_ok=True)
    for method in value("--methods").split(","):
        with path.open("a") as file:
            file.write(json.dumps({{"method": method, "of": said}}) + "\\n")
        time.sleep(float(os.environ.get("PACE", 0)))
elif os.environ.get("FAILS", "no such words") in said:
    sys.exit(3)
"""


@pytest.fixture
def stub(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def started(*arguments: str, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(SCRIPT), *arguments]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **piped)


def record(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    process = started(*arguments, **variables)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def steps(folder: Path) -> dict[str, list[str]]:
    lines = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()[1:]]
    return {name: rest for name, *rest in lines}


def rows(folder: Path) -> list[dict]:
    """Every row, each whole."""
    paths = sorted((folder / "rows").glob("*/*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    step = "echo a wrong kernel; exit 3"
    done = record("--dry-run", str(tmp_path), "10", DRY_STEP=step, JOBS="2")
    log = (tmp_path / "log.txt").read_text()
    found = steps(tmp_path)
    assert list(found) == ORDER
    assert found.pop("grid")[0] == "FAILED (3)" and "a wrong kernel" in log
    assert {status for status, *_ in found.values()} == {"ok"}, log[-3000:]
    assert int(found["prepare-six"][2]) > 0
    assert [found[name][2] for name in TIMED] == ["0"] * 3  # nothing compiled or timed anew
    assert done.returncode == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "Not well: grid (FAILED (3))." in summary and "`vit_small_patch16_224`" in summary
    assert {row.case.suite for row in read(tmp_path / "rows")} == {"six_projections", "train_step"}
    assert (tmp_path / "selftest-triton.jsonl").stat().st_size


def test_the_order_of_what_is_done(tmp_path: Path, stub: str) -> None:
    done = record("--dry-run", str(tmp_path / "out"), PYTHON=stub)
    assert done.returncode == 0, done.stdout
    assert list(steps(tmp_path / "out")) == ORDER
    calls = (tmp_path / "out" / "calls.txt").read_text().splitlines()
    prepares = [i for i, call in enumerate(calls) if "--prepare" in call]
    timed = [i for i, call in enumerate(calls) if "--rows" in call and "--prepare" not in call]
    assert max(prepares) < min(timed)  # all of the pool before any row
    of = lambda words: next(i for i, call in enumerate(calls) if words in call)  # noqa: E731
    checks = [of("--backend cuda"), of("--backend triton"), of("-m pytest")]
    assert [*timed, *checks] == sorted([*timed, *checks])
    assert len(rows(tmp_path / "out")) == 3 + 3 + 5


@pytest.mark.parametrize("suite", ["six_projections", "train_step"])
def test_what_is_done_anew_after_the_pool_fails(tmp_path: Path, stub: str, suite: str) -> None:
    done = record("--dry-run", str(tmp_path / "out"), PYTHON=stub, ANEW=suite)
    found = steps(tmp_path / "out")
    name = "six-graph" if suite == "six_projections" else "train-step"
    assert found[name][0] == "FAILED (1 done anew that were to be prepared)"
    assert done.returncode == 1


def test_one_that_fails_does_not_stop_the_next(tmp_path: Path, stub: str) -> None:
    done = record("--dry-run", str(tmp_path / "out"), PYTHON=stub, FAILS="--backend cuda")
    found = steps(tmp_path / "out")
    assert list(found) == ORDER and found["cuda-checks"][0] == "FAILED (3)"
    assert found["triton-checks"][0] == "ok" and done.returncode == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("during", TIMED)
def test_a_kill_leaves_what_was_done(tmp_path: Path, stub: str, during: str, end: int) -> None:
    out = tmp_path / "out"
    process = started("--dry-run", str(out), PYTHON=stub, PACE="0.3")
    before = 3 * TIMED.index(during)  # rows of the timed steps before it
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        there = rows(out) if (out / "rows").exists() else []
        if len(there) > before:
            break
        time.sleep(0.02)
    process.send_signal(end)
    process.communicate()
    found, after = steps(out), rows(out)
    assert after[: len(there)] == there or all(row in after for row in there)
    assert list(found)[: 4 + TIMED.index(during)] == [*PREPARED, *TIMED[: TIMED.index(during)]]
    if end == signal.SIGTERM:
        assert process.returncode == 143
        assert found[during][0] == "killed"
        assert (out / "summary.md").read_text() == "what was recorded\n"


def test_no_time_is_said(tmp_path: Path) -> None:
    done = record("--dry-run", str(tmp_path), "0")
    assert done.returncode == 0
    assert "| six-graph | no time left | 0 | 0 |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (("out", "x"), {}, "MINUTES is a whole number, got 'x'"),
        ((), {}, "record.sh [--dry-run] OUTDIR"),
        (("out",), {"JOBS": "0"}, "JOBS is a whole number from 1 on, got '0'"),
        (("out",), {"JOBS": "many"}, "JOBS is a whole number from 1 on, got 'many'"),
    ],
)
def test_wrong_words_are_named(tmp_path, monkeypatch, arguments, variables, said) -> None:
    arguments = [str(tmp_path / word) if word == "out" else word for word in arguments]
    done = record(*arguments, **variables)
    assert said in done.stderr and done.returncode == 2


def test_a_native_build_that_fails_fails_its_step() -> None:
    """It is not optional there, and the module must serve the machine's GPU."""
    text = SCRIPT.read_text()
    (line,) = [line for line in text.splitlines() if "pip install" in line]
    assert "FUSED_LORA_NATIVE=1" in line and line.rstrip().endswith("&& '$serves")
