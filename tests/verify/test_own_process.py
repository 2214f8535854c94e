"""A check cannot hurt its user: it hangs, aborts and exits elsewhere, and within a limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_lora.ops import backends
from fused_lora.types import Backend
from fused_lora.verify import own_process, verdicts
from fused_lora.verify.check import CannotVerifyNow
from fused_lora.worker import CannotStart, Worker
from tests.verify.fake_checks import RIGHT, make
from tests.verify.test_verdicts import plan

CPU = torch.device("cpu")
SLOW = pytest.mark.slow  # a process or more, each of which imports torch
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def worker():
    """One process for all that leave it alive."""
    made = Worker(idle_s=300)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path, worker):
    """As on a GPU: every check goes to the other process."""
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_LORA_VERIFY", raising=False)
    monkeypatch.setattr(own_process, "serves", lambda checked, device: True)
    monkeypatch.setattr(own_process, "_worker", worker)
    verdicts.forget()
    yield
    verdicts.forget()


def warned(how: str, *argument: str) -> str:
    """The one sentence on a check that fails; remembered in this process, and on disk."""
    checked = make(how, *argument)
    with pytest.warns(RuntimeWarning) as told:
        assert not verdicts.verdict(checked, CPU).passed
        assert not verdicts.verdict(checked, CPU).passed
    (only,) = told
    assert verdicts.load(checked.subject, CPU) == verdicts._known[checked.subject, CPU]
    verdicts.forget()
    with pytest.warns(RuntimeWarning):  # a new process: from the disk
        assert not verdicts.verdict(checked, CPU).passed
    said = str(only.message)
    assert said.startswith(f"fused_lora does not use triton fake ({how}")
    return said


def test_a_right_and_a_wrong_kernel_from_one_process(worker):
    assert verdicts.verdict(make("passes"), CPU) == RIGHT
    first = worker._process.pid
    assert "error 2.00e+00 of y is over the budget 1.00e+00" in warned("fails")
    assert worker._process.pid == first != os.getpid()


@pytest.mark.parametrize("how", ["hangs", pytest.param("holds_the_interpreter", marks=SLOW)])
def test_one_that_hangs_costs_the_limit_and_one_sentence(monkeypatch, worker, how):
    verdicts.verdict(make("passes"), CPU)  # it is started
    monkeypatch.setenv("FUSED_LORA_CHECK_SECONDS", "1")
    process, began = worker._process, time.monotonic()
    assert "its check did not end within 1 s and was killed" in warned(how)
    assert time.monotonic() - began < 20
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("how", "argument", "said"),
    [
        ("aborts", "", "its check ended its process by SIGABRT (device-side assert triggered)"),
        pytest.param("faults", "", "its check ended its process by SIGSEGV", marks=SLOW),
        pytest.param("exits", "3", "its check ended its process with status 3", marks=SLOW),
        ("exits", "0", "its check ended its process with status 0"),
    ],
)
def test_one_that_ends_its_process(how, argument, said):
    assert said in warned(how, argument)
    assert verdicts.verdict(make("passes"), CPU) == RIGHT  # another process serves


@SLOW
def test_one_that_spoils_its_device_leaves_its_process(worker):
    verdicts.verdict(make("passes"), CPU)
    first = worker._process
    assert "an illegal memory access" in warned("poisons")
    assert first.poll() is not None and worker._process is None


def test_one_that_is_killed_while_it_answers_is_no_verdict():
    checked = make("is_killed_while_answering")
    with (
        pytest.warns(RuntimeWarning, match="for 5 minutes: it is not checked yet, and its check"),
        pytest.raises(CannotVerifyNow, match="was killed from outside"),
    ):
        verdicts.verdict(checked, CPU)
    assert verdicts.load(checked.subject, CPU) is None


def test_a_full_memory_is_not_tried_at_every_call(monkeypatch, worker):
    checked, now = make("has_no_memory"), time.monotonic()
    monkeypatch.setattr(verdicts.time, "monotonic", lambda: now)
    with pytest.warns(RuntimeWarning, match="no memory is left"), pytest.raises(CannotVerifyNow):
        verdicts.verdict(checked, CPU)
    asked = []
    monkeypatch.setattr(worker, "call", lambda *args: asked.append(args) or {"not now": "full"})
    for _ in range(3):
        with pytest.raises(CannotVerifyNow, match="no memory is left"):
            verdicts.verdict(checked, CPU)
    assert not asked
    now += verdicts.AGAIN_S
    with pytest.warns(RuntimeWarning, match="full"), pytest.raises(CannotVerifyNow):
        verdicts.verdict(checked, CPU)
    assert len(asked) == 1


def test_a_process_that_does_not_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    own_process.close()
    with pytest.raises(CannotStart, match="no process can be started"):
        Worker().call("os", "getpid", (), 1.0)
    with pytest.warns(RuntimeWarning, match="no process"), pytest.raises(CannotVerifyNow):
        verdicts.verdict(make("passes"), CPU)


@SLOW
def test_an_idle_process_ends_and_another_is_started():
    short = Worker(idle_s=0.2)
    first = short.call("os", "getpid", (), 30.0)
    short._process.wait(60)
    assert short.call("os", "getpid", (), 30.0) != first
    short.close()


def test_the_library_serves_beside_a_kernel_that_hangs(monkeypatch, kernels):
    monkeypatch.setenv("FUSED_LORA_CHECK_SECONDS", "0.5")
    monkeypatch.setattr(backends, "of_launch", lambda launch, dtype: make("hangs", "", dtype))
    with pytest.warns(RuntimeWarning, match="did not end within 0.5 s"):
        assert plan().backend is Backend.ATEN


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf"])
def test_a_limit_that_is_none(monkeypatch, seconds):
    monkeypatch.setenv("FUSED_LORA_CHECK_SECONDS", seconds)
    said = f"FUSED_LORA_CHECK_SECONDS must be seconds above 0, got '{seconds}'"
    with pytest.raises(ValueError, match=said):
        verdicts.verdict(make("passes"), CPU)


CALLER = """
import sys, torch
from fused_lora.verify import verdicts
from fused_lora.verify import own_process
from tests.verify.fake_checks import make
own_process.serves = lambda checked, device: True
try:
    print(verdicts.verdict(make({how!r}, {path!r}), torch.device("cpu")).passed)
except verdicts.CannotVerifyNow as reason:
    print(reason)
"""


def caller(how: str, path: Path, **variables: str) -> subprocess.Popen:
    """A process whose main module is no file and has no guard, as an interactive one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CALLER.format(how=how, path=str(path))],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@SLOW
def test_of_several_processes_one_checks(tmp_path):
    path = tmp_path / "runs"
    started = [caller("counts", path) for _ in range(3)]
    assert [one.communicate()[0].strip() for one in started] == ["True"] * 3
    assert len(path.read_text().splitlines()) == 1


@SLOW
def test_who_waits_too_long_does_without(tmp_path):
    checked = make("passes")
    key = verdicts._key(checked.subject, CPU)
    with own_process.alone(key, verdicts.path().parent, 1.0) as mine:
        assert mine
        said = caller("passes", "", FUSED_LORA_CHECK_SECONDS="0.5").communicate()[0]
        assert "another process has been checking it for 0.5 s" in said
        assert caller("passes", "another").communicate()[0].strip() == "True"
    assert caller("passes", "").communicate()[0].strip() == "True"


@SLOW
def test_a_session_without_a_main_module_runs_it_elsewhere(tmp_path):
    path = tmp_path / "pid"
    one = caller("tells_its_process", path)
    assert one.communicate()[0].strip() == "True"
    assert path.read_text() != str(one.pid)
