"""First use: a kernel is checked before it serves, once, and a wrong one never serves."""

import json
import re
import subprocess
import sys
import time
import warnings
from itertools import product

import pytest
import torch

from fused_lora import disk
from fused_lora.kernels.triton import available as identities
from fused_lora.kernels.triton.launches import Launch
from fused_lora.kernels.triton.tiles import (
    ELEMENTS,
    FP8,
    PACK,
    PACK_GRADS,
    GradTile,
    MergeTile,
    ThinTile,
    Tile,
    gelu_grads_candidates,
    row_tile,
)
from fused_lora.ops.planning import plan_for
from fused_lora.types import Backend, Forward, Impl, Needs, Span
from fused_lora.verify import launch_checks, verdicts
from fused_lora.verify.check import CannotVerifyNow
from fused_lora.verify.kernel_registry import of_launch
from tests.testing.mutants import MUTANTS
from tests.verify.conftest import RESULTS, forget

CPU = torch.device("cpu")
TILES = {
    "extended": Tile(128, 128, 64, 3, 8),
    "one_pass": Tile(128, 64, 64, 3, 8),
    "shrink": ThinTile(64, 16, 64, 4, 4),
    "grad": GradTile(16, 128, 64, 4, 4),
    "merge": MergeTile(),
}
ELEMENTWISE = {
    "extended_gelu": TILES["extended"],
    "extended_grads": TILES["extended"],
    "extended_grads_tanh": TILES["extended"],
    "gelu_grads": gelu_grads_candidates(512, 90)[0],
    "gelu_grads_tanh": gelu_grads_candidates(512, 90)[0],
    "pack_grads": PACK_GRADS[0],
    "extended_scale": TILES["extended"],
    "extended_wide": TILES["extended"],
    "one_pass_scale": TILES["one_pass"],
    "one_pass_wide": TILES["one_pass"],
    "extended_dropout": TILES["extended"],
    "shrink_dropout": TILES["shrink"],
    "shrink_norm": TILES["shrink"],
    "shrink_gelu": TILES["shrink"],
    "expand_norm": TILES["shrink"],
    "expand_residual": TILES["shrink"],
    "grad_dropout": TILES["grad"],
    "border_weight": PACK,
    "merge_many": MergeTile(),
    "layer_norm": row_tile(200),
    "gelu": ELEMENTS,
    "quantise": row_tile(200),
    "extended_fp8": FP8[0],
}


def plan(impl=Impl.AUTO, rank=16, dtype=torch.bfloat16):
    return plan_for(788, 64, 96, (Span(0, 96, rank),), dtype, True, Needs(), CPU, impl=impl)


def verdict(name="extended", dtype="bfloat16"):
    return verdicts.verdict(of_launch(Launch(name, (TILES | ELEMENTWISE)[name]), dtype), CPU)


def one_element(t):
    t.view(-1)[t.numel() // 2] += t.float().square().mean().sqrt().to(t.dtype)
    return t


def last_bit(t):
    return torch.where(torch.rand_like(t) < 0.5, t, torch.nextafter(t, t + 1))


def test_right_kernels_serve_and_are_checked_once(kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = plan()
    assert first.backend is Backend.TRITON
    ran = dict(kernels.runs)
    assert ran["extended"] + ran["one_pass"] > 0 and ran["merge"] == 0  # only what is needed
    assert plan() is first
    forget()
    assert plan() == first
    assert kernels.runs == ran  # from the disk


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *product(TILES, ["bfloat16", "float16", "float32", "tf32"]),
        *product(ELEMENTWISE, ["bfloat16", "float32"]),
    ],
)
def test_every_kernel_and_dtype_has_a_check_that_one_wrong_element_fails(kernels, name, dtype):
    assert verdict(name, dtype).passed
    kernels.faults[name] = one_element
    forget()
    verdicts.path().unlink()
    with pytest.warns(RuntimeWarning) as told:
        assert not verdict(name, dtype).passed
        assert not verdict(name, dtype).passed
    (only,) = told
    said = str(only.message)
    assert re.search(
        rf"triton {name} \(.*\) in {dtype} on cpu: error \d.* is over the budget", said
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", TILES)
def test_every_mutant_fails_its_check(kernels, monkeypatch, name, mutant, dtype):
    wrong, changed = MUTANTS[mutant]
    assert set(changed) & set(RESULTS[name])

    def run(p, tile):
        found = wrong(p)
        return {key: found[key] for key in RESULTS[name]}

    monkeypatch.setitem(launch_checks.RUNS, name, run)
    with pytest.warns(RuntimeWarning):
        assert not verdict(name, dtype).passed


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda t: t.fill_(torch.nan), "error nan"),
        (lambda t: last_bit(t), "two runs gave different bits"),
        (lambda t: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda t: t[1:], "ValueError: shapes differ"),
    ],
)
def test_what_fails_a_kernel(kernels, fault, said):
    kernels.faults["extended"] = fault
    with pytest.warns(RuntimeWarning, match=re.escape(said)):
        assert not verdict(dtype="float32").passed


def test_a_wrong_kernel_never_serves_and_the_next_one_does(kernels):
    kernels.faults["extended"] = kernels.faults["one_pass"] = one_element
    with pytest.warns(RuntimeWarning) as told:
        chosen = plan()
    assert Forward.EXTENDED not in (chosen.forward, chosen.dx)
    assert Forward.ONE_PASS not in (chosen.forward, chosen.dx)
    assert len({str(one.message) for one in told}) == len(told)
    forget()
    with pytest.warns(RuntimeWarning):
        assert plan() == chosen  # the verdict on disk speaks again, and is told again


def test_where_nothing_of_triton_is_right_the_library_serves(kernels):
    kernels.faults |= dict.fromkeys(TILES, one_element)
    refused = pytest.raises(RuntimeError, match="impl='triton' cannot serve: .* over the budget")
    with pytest.warns(RuntimeWarning):
        assert plan().backend is Backend.ATEN
        with refused:
            plan(Impl.TRITON)


def test_a_full_memory_is_no_verdict(kernels, monkeypatch):
    def full(t):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    kernels.faults |= dict.fromkeys(TILES, full)
    now = time.monotonic()
    monkeypatch.setattr(verdicts.time, "monotonic", lambda: now)
    with pytest.warns(RuntimeWarning, match="does without .* for 5 minutes: .* no memory is left"):
        assert plan().backend is Backend.ATEN
    assert not verdicts.path().exists()
    kernels.faults.clear()
    ran = dict(kernels.runs)
    assert plan().backend is Backend.ATEN and kernels.runs == ran  # not tried at every call
    now += verdicts.AGAIN_S
    assert plan().backend is Backend.TRITON


@pytest.mark.parametrize("moment", ["capture", "compile", "fake"])
def test_nothing_is_checked_in_a_capture_or_a_trace(kernels, monkeypatch, moment):
    from contextlib import nullcontext

    from torch._subclasses.fake_tensor import FakeTensorMode

    within = nullcontext()
    with monkeypatch.context() as patch:
        if moment == "capture":
            patch.setattr("fused_lora.verify.verdicts.why_not_now", lambda device: "in a capture")
        elif moment == "compile":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        else:
            within = FakeTensorMode()
        with within:
            assert plan().backend is Backend.ATEN
            with pytest.raises(RuntimeError, match="not checked yet"):
                plan(Impl.TRITON)
    assert not any(kernels.runs.values()) and not verdicts.path().exists()
    assert plan().backend is Backend.TRITON


def test_a_capture_uses_what_was_checked_before(kernels, monkeypatch):
    before = plan()
    forget()
    monkeypatch.setattr("fused_lora.verify.verdicts.why_not_now", lambda device: "in a capture")
    assert plan() == before  # the disk has it


def test_a_capture_is_asked_for_on_a_gpu_alone(monkeypatch):
    from fused_lora.verify.verdicts import why_not_now

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_not_now(torch.device("cuda", 0)) == "a CUDA graph is being captured"
    assert why_not_now(CPU) is None


def test_rows_of_a_table_on_disk_are_added_to_its_own(tmp_path):
    path = tmp_path / "rows.json"
    assert disk.table(path, lambda: pytest.fail("of no file nobody asks which")) == {}
    disk.merge_table(path, "one", {"a": 1})
    disk.merge_table(path, "other", {"a": 2})
    disk.merge_table(path, "one", {"b": 3})
    assert disk.read(path) == {"one": {"a": 1, "b": 3}, "other": {"a": 2}}
    assert disk.table(path, lambda: "one") == {"a": 1, "b": 3}
    disk.merge(path, {"one": "no table"})
    assert disk.table(path, lambda: "one") == {} == disk.table(path, lambda: "none")


class TestModes:
    def test_off(self, kernels, monkeypatch):
        monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
        kernels.faults |= dict.fromkeys(TILES, one_element)
        assert plan().backend is Backend.TRITON
        assert not any(kernels.runs.values()) and not verdicts.path().exists()

    def test_always(self, kernels, monkeypatch):
        monkeypatch.setenv("FUSED_LORA_VERIFY", "always")
        verdict()
        verdict()
        once = kernels.runs["extended"]
        forget()
        verdict()
        assert kernels.runs["extended"] == 2 * once

    def test_another_word(self, kernels, monkeypatch):
        monkeypatch.setenv("FUSED_LORA_VERIFY", "sometimes")
        with pytest.raises(ValueError, match="FUSED_LORA_VERIFY must be one of .* got 'sometimes'"):
            verdict()


def test_the_callers_state_is_left_alone(kernels):
    before = torch.get_rng_state()
    seen = []
    kernels.faults["extended"] = lambda t: seen.append(
        (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
    ) or t  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert verdict(dtype="float32").passed
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(False, False)}
    assert torch.equal(torch.get_rng_state(), before)


class TestDisk:
    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 3}'])
    def test_torn_files_are_ignored_and_replaced(self, kernels, text):
        verdicts.path().write_text(text)
        assert verdict().passed
        ran = kernels.runs["extended"]
        forget()
        verdict()
        assert kernels.runs["extended"] == ran

    @pytest.mark.parametrize(
        "change",
        [
            {"passed": "yes"},
            {"passed": True, "error": "1.0", "budget": "0.5"},  # contradicts itself
            {"error": "small"},
            {"budget": None},
        ],
    )
    def test_odd_rows_are_ignored(self, kernels, change):
        verdict()
        ran = kernels.runs["extended"]
        rows = json.loads(verdicts.path().read_text())
        verdicts.path().write_text(json.dumps({key: row | change for key, row in rows.items()}))
        forget()
        verdict()
        assert kernels.runs["extended"] == 2 * ran

    @pytest.mark.parametrize("part", ["driver", "version", "sources", "checks"])
    def test_another_driver_version_or_source_asks_anew(self, kernels, monkeypatch, part):
        verdict()
        ran = kernels.runs["extended"]
        if part == "driver":
            monkeypatch.setattr(identities, "_driver", lambda: "999.99")
        elif part == "version":
            monkeypatch.setattr(torch, "__version__", "99.0")
        elif part == "sources":
            monkeypatch.setattr(identities, "sources", lambda *folders: "another")
        else:
            monkeypatch.setattr(verdicts, "_checks", lambda: "another")
        identities.identity.cache_clear()
        forget()
        verdict()
        monkeypatch.undo()
        identities.identity.cache_clear()
        assert kernels.runs["extended"] == 2 * ran

    def test_a_folder_that_cannot_be_written_is_passed_over(self, kernels, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path / "file"))
        assert verdict().passed

    def test_processes_that_write_at_once_leave_a_whole_file(self, tmp_path):
        path = tmp_path / "verdicts.json"
        code = (  # the module alone: importing torch takes longer than the test
            "import importlib.util as u, pathlib, sys\n"
            f"spec = u.spec_from_file_location('disk', {disk.__file__!r})\n"
            "disk = u.module_from_spec(spec); spec.loader.exec_module(disk)\n"
            "path, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
            "for i in range(40): disk.merge(path, {f'{name} {i}': [i] * 500})"
        )
        started = [
            subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(4)
        ]
        while any(one.poll() is None for one in started):
            if path.exists():
                json.loads(path.read_text())  # whole at every moment
        assert [one.returncode for one in started] == [0] * 4
        rows = json.loads(path.read_text())
        assert rows == {f"{n} {i}": [i] * 500 for n in range(4) for i in range(40)}
        assert list(tmp_path.iterdir()) == [path]


def test_a_source_file_changes_the_digest(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = identities.sources(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert identities.sources(tmp_path) != before


def test_not_now_is_no_runtime_error():
    assert not issubclass(CannotVerifyNow, RuntimeError)  # which callers catch for other reasons
