"""The loop: fused against naive, killed and taken up again, NaN, schedule, accumulation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.bench.methods import Naive
from fused_lora.bench.workload import adapters
from fused_lora.distill import copy_layers
from fused_lora.distill.models import build, load
from fused_lora.distill.train import checkpoint
from fused_lora.distill.train.fit import LAST, Cosine, Diverged, Fit
from fused_lora.distill.train.log import StepProgress
from fused_lora.testing.yardstick import in_every_order, judge
from tests.distill.runs import checkpoint as teacher_file
from tests.distill.runs import fit_of, recipe


@pytest.fixture
def teacher(tmp_path: Path) -> nn.Module:
    model = build(recipe().teacher)
    load(model, Path(teacher_file(tmp_path)))
    return model


def student_of(teacher: nn.Module, rank: int = 4) -> nn.Module:
    student = copy_layers(teacher, 2)
    fused_lora.patch(student, rank, seed=5)
    return student


def naive_of(teacher: nn.Module, like: nn.Module) -> nn.Module:
    """Naive LoRA that starts where ``like`` does."""
    student = Naive().install(copy_layers(teacher, 2), 4)
    theirs = adapters(like)
    with torch.no_grad():
        for key, parameter in adapters(student).items():
            parameter.copy_(theirs[key])
    return student


def losses(fit: Fit) -> torch.Tensor:
    """Of every step of the whole run."""
    fit.run()
    return torch.tensor(fit.losses, dtype=torch.float64)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_fused_learns_what_naive_learns_step_for_step(teacher: nn.Module, precision: str) -> None:
    fused = student_of(teacher)
    naive = naive_of(teacher, fused)
    exact_teacher = copy.deepcopy(teacher).double()
    exact = fit_of(exact_teacher, naive_of(exact_teacher, student_of(exact_teacher)), "fp64")
    with torch.no_grad():
        for key, parameter in adapters(exact.objective.student).items():
            parameter.copy_(adapters(fused)[key])
    truth, ours = losses(exact), losses(fit_of(teacher, fused, precision))
    plain = in_every_order(lambda: losses(fit_of(teacher, copy.deepcopy(naive), precision)))
    assert truth[-1] < 0.9 * truth[0]  # it learns
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for step in range(len(truth)):
        mine, right, *theirs = (run[: step + 1] for run in (ours, truth, *plain))
        verdict = judge(f"loss {step}", mine, theirs, right, dtype)
        assert verdict.passed, verdict


class Killed(Exception):
    """The machine went away."""


def kill_at(fit: Fit, step: int) -> None:
    """``fit`` stops without a word in ``step``."""
    inner = fit.wanted

    class Wanted:
        calls = 0

        def __call__(self, batch: object) -> object:
            Wanted.calls += 1
            if Wanted.calls > step:
                raise Killed
            return inner(batch)  # type: ignore[arg-type]

    fit.wanted = Wanted()  # type: ignore[assignment]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_killed_run_ends_where_an_unbroken_one_does(
    teacher: nn.Module, tmp_path: Path, precision: str
) -> None:
    table = {"save_every": 3, "log_every": 2}
    whole = fit_of(teacher, student_of(teacher), precision, 10, folder=tmp_path / "a", **table)
    assert whole.run() == 10
    broken = fit_of(teacher, student_of(teacher), precision, 10, folder=tmp_path / "b", **table)
    kill_at(broken, 8)
    with pytest.raises(Killed):
        broken.run()
    again = fit_of(teacher, student_of(teacher), precision, 10, folder=tmp_path / "b", **table)
    assert again.run() == 4  # from step 6
    one, other = (checkpoint.kept(run.objective) for run in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in "ab"]
    assert [json.loads(line)["step"] for line in logs[1]] == [2, 3, 4, 6, 8, 9, 10]
    assert json.loads(logs[0][-1]) == json.loads(logs[1][-1])
    assert not list(tmp_path.rglob("*.part"))


def test_accumulation_is_a_larger_batch(teacher: nn.Module) -> None:
    runs = [
        fit_of(teacher, student_of(teacher), steps=7, batch_size=12 // n, accumulate=n)
        for n in (1, 3)
    ]
    for run in runs:
        run.run()
    one, other = (checkpoint.kept(run.objective) for run in runs)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-12)
    assert all(torch.allclose(v, other[k], rtol=1e-9, atol=1e-12) for k, v in one.items())


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    teacher: nn.Module, tmp_path: Path
) -> None:
    fit = fit_of(teacher, student_of(teacher), steps=9, folder=tmp_path, save_every=2, log_every=3)
    inner, calls = fit.wanted, []

    def wanted(batch: object) -> list[torch.Tensor]:
        calls.append(1)
        tokens = inner(batch)  # type: ignore[arg-type]
        return [each * torch.nan if len(calls) == 6 else each for each in tokens]

    fit.wanted = wanted  # type: ignore[assignment]
    with pytest.raises(
        Diverged, match=r"loss of step 6 is nan at lr .*last.safetensors, of step 4"
    ):
        fit.run()
    assert checkpoint.header_of(tmp_path / LAST)["step"] == 4
    fit_of(teacher, student_of(teacher), steps=9, folder=tmp_path, save_every=2, log_every=3).run()
    assert checkpoint.header_of(tmp_path / LAST)["step"] == 9


def test_a_loss_that_explodes_stops_the_run(teacher: nn.Module, tmp_path: Path) -> None:
    table = {"steps": 9, "folder": tmp_path, "save_every": 2, "log_every": 1}

    def blown(**more: object) -> Fit:
        fit = fit_of(teacher, student_of(teacher), **table, **more)
        inner, calls = fit.wanted, []

        def wanted(batch: object) -> list[torch.Tensor]:
            calls.append(1)
            return [each * (200 if len(calls) >= 5 else 1) for each in inner(batch)]  # type: ignore

        fit.wanted = wanted  # type: ignore[assignment]
        return fit

    with pytest.raises(
        Diverged, match=r"mean loss of steps 5 to 5 is .* train.stop_above = 10 .*, of step 4"
    ):
        blown().run()
    assert checkpoint.header_of(tmp_path / LAST)["step"] == 4
    with pytest.raises(Diverged, match="steps 9 to 9"):  # the first loss is in the checkpoint
        blown().run()
    (tmp_path / LAST).unlink()
    assert blown(stop_above=0.0).run() == 9


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    progress = StepProgress(100, 20, 32, "distill", True, lambda: now[0])
    for _ in range(40):
        now[0] += 1.0
        progress.update()
    progress.show(0.25)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "distill: step 25 of 100, 32.0 images/s, 0:01:15 left"
    assert lines[1:] == [
        "distill: step 55 of 100, 32.0 images/s, 0:00:45 left",
        "distill: step 60 of 100, loss 0.25, 32.0 images/s, 0:00:40 left",
    ]
    StepProgress(100, 0, 32, "distill", False, lambda: now[0]).close()
    assert not capsys.readouterr().err


def test_refuses_checkpoints_that_do_not_fit(teacher: nn.Module, tmp_path: Path) -> None:
    fit_of(teacher, student_of(teacher), folder=tmp_path, steps=2).run()
    other = fit_of(teacher, student_of(teacher), folder=tmp_path, steps=2)
    other.header = {"train": {"steps": 3}}
    with pytest.raises(checkpoint.CheckpointError, match="train was None and is {'steps': 3}"):
        other.run()
    with pytest.raises(checkpoint.CheckpointError, match=r"lora_A.* is \(4, 16\), the model's \(2"):
        fit_of(teacher, student_of(teacher, 2), folder=tmp_path, steps=2).run()
    bare = fit_of(teacher, copy_layers(teacher, 2, share=False).requires_grad_(True), steps=2)
    bare.folder = tmp_path
    with pytest.raises(checkpoint.CheckpointError, match="in it or in the model alone"):
        bare.run()
    (tmp_path / LAST).write_bytes(b"half a file")
    with pytest.raises(checkpoint.CheckpointError, match="is no safetensors file"):
        fit_of(teacher, student_of(teacher), folder=tmp_path, steps=2).run()


def test_the_schedule_is_the_papers() -> None:
    schedule = Cosine(blr=1e-3, effective_batch=512, steps=100, warmup=0.1)
    rates = [schedule.at(step) for step in range(100)]
    assert schedule.peak == pytest.approx(2e-3)
    assert rates[:10] == pytest.approx([2e-4 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2e-3) and rates[55] == pytest.approx(1e-3)
    assert 0 < rates[-1] < 1e-5 and rates[10:] == sorted(rates[10:], reverse=True)
    assert Cosine(1.0, 256, 3, 0.0).at(0) == 1.0


def test_nothing_to_train_is_an_error(teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match="no parameter of the student trains"):
        fit_of(teacher, copy_layers(teacher, 2))


def test_tensorboard(teacher: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit_of(teacher, student_of(teacher), folder=tmp_path, steps=2, log="tensorboard").run()
    assert list((tmp_path / "tensorboard").glob("events.*"))
