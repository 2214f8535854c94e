"""prepare: a first step's checks, compiles and times, beforehand; the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import cli
from fused_lora.kernels.triton import launch
from fused_lora.ops import backends, measured, planning
from fused_lora.patching import prepare as module
from fused_lora.patching.report import PatchError
from fused_lora.programs import run
from fused_lora.verify import own_process, verdicts
from fused_lora.worker import Worker
from tests.patching.models import build, images
from tests.verify.conftest import Kernels, kernels  # noqa: F401


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """As a new process on a new machine would begin."""
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_LORA_PLAN", raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    run.forget()
    planning._plan_for.cache_clear()
    verdicts.forget()


def patched(**options):
    model = build()
    fused_lora.patch(model, 4, **options)
    return model


def quiet(done, of, what):
    pass


def test_on_a_cpu_there_is_nothing_to_prepare():
    model = patched()
    found = fused_lora.prepare(model, images(model))
    assert str(found) == (
        "nothing to prepare: on cpu the library's kernels serve, and the plan chooses by their cost"
    )
    assert not run.programs()


@pytest.mark.parametrize("as_given", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_what_is_measured_is_timed_once_and_the_model_is_as_it_was(monkeypatch, as_given):
    monkeypatch.setenv("FUSED_LORA_PLAN", "measure")
    model, x = patched(), images(build())
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_pre_hook(lambda m, args: m.count.add_(1) and None)
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first = fused_lora.prepare(model, as_given(x), tell=quiet)
    assert first.timed > 0 and first.checked == first.compiled == 0 and not first.wrong
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 1 and torch.equal(parameter.grad, torch.ones_like(parameter))
    timed = measured.count()
    model(x).mean().backward()
    forget()
    model(x).mean().backward()  # a new process: from the disk
    assert measured.count() == timed
    assert fused_lora.prepare(model, as_given(x), tell=quiet).timed == 0


def test_kernels_are_checked_in_a_pool_and_serve(kernels: Kernels, monkeypatch):  # noqa: F811
    """Those of a first plan, and what its verdict makes possible."""
    ran, asked = [], []
    monkeypatch.setattr(module, "_why_nothing", lambda device: "")
    monkeypatch.setattr(own_process, "serves", lambda checked, device: True)

    def check(checked, device, worker=None):
        assert isinstance(worker, Worker)
        asked.append(checked.subject)
        return checked.check(device)

    monkeypatch.setattr(own_process, "check", check)
    monkeypatch.setattr(module._Pool, "compiles", lambda self, jobs, tell: iter(()))
    model, x = patched(level="linear"), images(build())
    # Launches cannot run here: the step that follows all checks is the library's.
    real = module._check_all

    def check_all(*args):
        real(*args)
        monkeypatch.setenv("FUSED_LORA_IMPL", "aten")

    monkeypatch.setattr(module, "_check_all", check_all)
    found = fused_lora.prepare(
        model, x, processes=2, tell=lambda done, of, what: ran.append((done, of, what))
    )
    monkeypatch.delenv("FUSED_LORA_IMPL")
    assert found.checked == len(asked) == len(set(asked)) > 3
    assert not found.wrong and ran[-1][0] == ran[-1][1]
    assert all(verdicts.load(subject, torch.device("cpu")).passed for subject in asked)
    count = dict(kernels.runs)
    forget()
    assert planning.plan_for(*question()).backend.value == "triton"
    assert kernels.runs == count


def question():
    from fused_lora.types import Needs, Span

    spans = (Span(0, 48, 4),)
    return 10, 48, 48, spans, torch.float32, True, Needs(), torch.device("cpu")


def test_a_kernel_that_fails_is_named_and_the_next_is_asked_for(
    kernels: Kernels,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(module, "_why_nothing", lambda device: "")
    monkeypatch.setattr(module._Pool, "compiles", lambda self, jobs, tell: iter(()))
    for name in kernels.runs:
        kernels.faults[name] = torch.zeros_like
    model, x = patched(level="linear"), images(build())
    with pytest.warns(RuntimeWarning, match="fused_lora does not use triton"):
        found = fused_lora.prepare(model, x, tell=quiet)
    assert found.checked == len(found.wrong) > 3
    assert "is over the budget" in found.wrong[0] and str(found).count("\n") == len(found.wrong)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((nn.Linear(2, 2), torch.ones(1, 2)), {}, PatchError, "Linear carries no fused_lora"),
        ((None, 3), {}, TypeError, "example must be a tensor, a sequence .* got 3"),
        ((None, "x"), {}, TypeError, "got 'x'"),
        ((None, None), {"processes": 0}, ValueError, "a whole number from 1 on, got 0"),
        ((None, None), {"processes": True}, ValueError, "a whole number from 1 on, got True"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, said):
    model, example = arguments
    with pytest.raises(error, match=said):
        fused_lora.prepare(model or patched(), example, **options)


def test_a_wrapper_for_several_processes_is_refused():
    kind = type("DistributedDataParallel", (nn.Module,), {})
    wrapped = kind()
    wrapped.module = patched()
    with pytest.raises(PatchError, match="before DistributedDataParallel wraps it"):
        fused_lora.prepare(wrapped, torch.ones(1))


def test_another_word_for_the_plan(monkeypatch):
    monkeypatch.setenv("FUSED_LORA_PLAN", "guess")
    said = r"FUSED_LORA_PLAN must be one of \('measure', 'model'\), got 'guess'"
    with pytest.raises(ValueError, match=said):
        fused_lora.prepare(patched(), torch.ones(1))


def test_the_command(capsys):
    arguments = ["prepare", "vit_tiny_patch16_224", "--rank", "4", "--device", "cpu"]
    assert cli.main([*arguments, "--dtype", "float32", "--batch-size", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "block level, float32: nothing to prepare: on cpu" in said[0]
    assert cli.main([*arguments, "--dtype", "int"]) == 2
    assert "--dtype must be float32, bfloat16, float16 or amp, got 'int'" in capsys.readouterr().err
    assert cli.main([*arguments, "--rank", "4,x"]) == 2
    assert "--rank must be whole numbers by commas, got '4,x'" in capsys.readouterr().err


class TestFirstStep:
    """Without prepare, the first step says one line."""

    def test_one_line_once(self, kernels: Kernels, monkeypatch, caplog):  # noqa: F811
        monkeypatch.setattr(own_process, "serves", lambda checked, device: True)
        monkeypatch.setattr(
            own_process, "check", lambda checked, device, w=None: checked.check(device)
        )
        monkeypatch.setattr(verdicts, "_announced", False)
        planning.plan_for(*question())
        planning.plan_for(11, *question()[1:])
        (line,) = [record.message for record in caplog.records if record.name == "fused_lora"]
        assert "first use on this device: compiling and checking" in line
        assert "about" in line and str(verdicts.path().parent) in line
        assert "fused_lora.prepare does all of it beforehand" in line

    def test_nothing_where_nothing_is_checked(self, caplog, monkeypatch):
        monkeypatch.setattr(verdicts, "_announced", False)
        model = patched()
        model(images(model)).mean().backward()
        assert not [record for record in caplog.records if record.name == "fused_lora"]


def recorded(monkeypatch):
    """A program with launches, on a CPU that passes for a GPU until it would run."""
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    monkeypatch.setattr("fused_lora.kernels.triton.available.why_not", lambda d=None, t=None: None)
    monkeypatch.setattr("fused_lora.plan.cost_kernels.TRITON_EFFICIENCY", 1e6)
    backends._triton.cache_clear()
    model, x = patched(level="linear"), images(build())
    with verdicts.collecting(), run.looking() as seen:
        model(x).mean().backward()
    backends._triton.cache_clear()
    return seen


def test_programs_that_are_looked_at_are_not_kept(monkeypatch):
    model, x = patched(), images(build())
    with run.looking() as seen:
        got = model(x)
    assert seen and not run.programs()
    assert torch.equal(model(x), got) and run.programs()


def test_a_launch_is_compiled_from_its_request_alone(monkeypatch):
    """What a program would launch, pickled, compiled elsewhere: kernel, arguments, constants."""
    pytest.importorskip("triton")
    import pickle

    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(own_process, "serves", lambda checked, device: False)
    seen = recorded(monkeypatch)
    wanted = [one for program in seen.values() for one in launch.requests(program)]
    assert wanted
    warmed = []
    monkeypatch.setattr(
        JITFunction, "warmup", lambda self, *args, grid, **named: warmed.append((self, args, named))
    )
    for one in wanted:
        module_name, name, device, grid, forms, args, constants = pickle.loads(pickle.dumps(one))
        assert launch.compile_one(module_name, name, "cpu", grid, forms, args, constants)
    assert len(warmed) == len(wanted)
    for (kernel, args, named), one in zip(warmed, wanted, strict=True):
        assert kernel.fn.__name__ == one[1] and named == one[-1]
        stands = [a for a in one[5] if isinstance(a, launch.Stand)]
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert [(t.dtype, t.data_ptr() % 16) for t in tensors[: len(stands)]] == [
            (s.dtype, s.start) for s in stands
        ]
