"""Where ceilings come from: the table, the disk, or half a second of measuring."""

import pytest
import torch

from fused_lora.ops import ceilings
from fused_lora.ops import ceilings as resolving
from fused_lora.plan import problem as plan_device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache folder and a memory of the test's own, and measurements allowed."""
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSED_LORA_CALIBRATE")
    resolving._ceilings.cache_clear()
    yield
    resolving._ceilings.cache_clear()


def measured(monkeypatch, steady):
    """Count the measurements; each is ``steady`` or not."""
    calls = []
    figures = plan_device.Ceilings("here", "float32", 100.0, 8.0, 20.0, 3.0, True)
    monkeypatch.setattr(ceilings, "measure", lambda *a: calls.append(a) or (figures, steady))
    return calls


def again(dtype=torch.float32):
    """As a new process would ask."""
    resolving._ceilings.cache_clear()
    return resolving.ceilings(CPU, dtype)


def test_measured_once_then_read_from_disk(monkeypatch):
    calls = measured(monkeypatch, steady=True)
    assert again() == again()
    assert len(calls) == 1
    again(torch.bfloat16)
    assert len(calls) == 2


def test_figures_taken_beside_another_program_are_not_kept(monkeypatch):
    calls = measured(monkeypatch, steady=False)
    again()
    resolving.ceilings(CPU, torch.float32)
    assert len(calls) == 1
    again()
    assert len(calls) == 2


def test_switched_off(monkeypatch):
    calls = measured(monkeypatch, steady=True)
    monkeypatch.setenv("FUSED_LORA_CALIBRATE", "0")
    assert not again().measured
    assert not calls


def test_the_thread_count_is_part_of_the_name(monkeypatch):
    calls = measured(monkeypatch, steady=True)
    again()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again()
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 2


def test_a_real_measurement_is_plausible():
    figures, steady = ceilings.measure(CPU, torch.float32, "here")
    assert figures.measured
    assert 0.1 < figures.matmul_gflops < 1e6
    assert ceilings.HALF_RANKS[0] <= figures.half_rank <= ceilings.HALF_RANKS[1]
    assert 0.1 < figures.bandwidth_gbs < 1e5
    assert 0 < figures.call_us < 1e5
    assert isinstance(steady, bool)


def test_the_plan_follows_the_thread_count(monkeypatch):
    from fused_lora.ops.planning import plan_for
    from fused_lora.types import Needs, Span

    calls = measured(monkeypatch, steady=True)
    question = (5, 7, 9, (Span(0, 9, 3),), torch.float32, True, Needs(), CPU)
    threads = torch.get_num_threads()
    try:
        for count in (threads + 1, threads + 1, threads + 2):
            torch.set_num_threads(count)
            plan_for(*question)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 2


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_is_read_however_it_was_set(precision):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision  # after which torch refuses to read allow_tf32
    try:
        key, _ = resolving.conditions(torch.device("cuda"), torch.float32)
    finally:
        matmul.fp32_precision = before
    assert key == {"tf32": "tf32", "ieee": "float32"}[precision]


def test_what_the_caller_has_switched_on_does_not_reach_the_measurement(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    seen = []

    def measure(*_):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.append((product.dtype, isinstance(product, FakeTensor)))
        return plan_device.unmeasured("here", "float32"), False

    monkeypatch.setattr(ceilings, "measure", measure)
    with torch.autocast("cpu", torch.bfloat16):
        again()
    with FakeTensorMode():
        again()
    assert seen == [(torch.float32, False)] * 2


def test_a_user_without_a_home_is_served(monkeypatch):
    from pathlib import Path

    from fused_lora import env

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSED_LORA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert env.cache_dir().name == "fused_lora"


GPU = torch.device("cuda", 0)


class Device:
    """A GPU by what a probe asks of it: a large product takes a millisecond, its host is slow."""

    def __init__(self, monkeypatch):
        self.sleeps = 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)
        monkeypatch.setattr(torch.cuda, "_sleep", self._sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
        monkeypatch.setattr(ceilings, "_probes", lambda *_: [lambda: None] * 4)
        monkeypatch.setattr(ceilings, "BUDGET_S", 0.0)

    def _sleep(self, cycles):
        self.sleeps += 1

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


def test_a_gpu_is_probed_by_device_events_behind_a_sleep(monkeypatch):
    device = Device(monkeypatch)
    figures, steady = ceilings.measure(GPU, torch.bfloat16, "a GPU")
    assert steady and device.sleeps == 4 * 4 + 3  # whatever the host took
    assert figures.matmul_gflops == pytest.approx(2 * 8192 * 2048**2 / 1e-3 * 1e-9)
    assert figures.gap_us == pytest.approx(1e3 / ceilings.QUEUED)
    assert figures.call_us < 1e3  # the host's own clock


def test_a_gpu_is_probed_on_sizes_that_fill_it_and_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 8 << 30))
    assert ceilings._that_fit(GPU) == ceilings.Sizes(8192, 2048, 16, 128 << 20)
    tiles = ceilings.GPU.rows * ceilings.GPU.width // 128**2
    assert tiles > 2 * 148  # of the largest chip's processors


@pytest.mark.parametrize("moment", ["capture", "trace"])
def test_no_probe_runs_in_a_capture_or_a_trace(monkeypatch, moment):
    calls = measured(monkeypatch, steady=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an unknown GPU")
    now = {"reason": "a CUDA graph is being captured"}
    monkeypatch.setattr(resolving, "why_not_now", lambda device: now["reason"])
    usual = resolving.ceilings(GPU, torch.float16)
    assert not calls and not usual.measured and usual.gap_us is not None
    assert usual.matmul_gflops == 100_000 and not list(resolving.env.cache_dir().glob("*"))
    now["reason"] = None
    assert resolving.ceilings(GPU, torch.float16).matmul_gflops == 100.0 and len(calls) == 1
    now["reason"] = "a CUDA graph is being captured"
    assert resolving.ceilings(GPU, torch.float16).matmul_gflops == 100.0  # what is kept
