"""Measured plans: timed once, kept on disk, never in a capture or a trace, shown by explain."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_lora
from fused_lora.ops import measured, planning
from fused_lora.ops.ceilings import ceilings
from fused_lora.ops.measured import TimingMode
from fused_lora.plan.choose import ordered, ranked
from fused_lora.plan.strategies import ROUNDS_ONCE, candidates
from fused_lora.programs import run
from fused_lora.types import AdapterTraits, Forward, FusionContext, Impl, Keep, Needs, Span
from tests.patching.models import build, images

CPU = torch.device("cpu")
SPANS = (Span(0, 40, 4),)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Plans by time, of a new machine."""
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FUSED_LORA_PLAN", "measure")
    for name, less in {"ROUNDS_CPU": 2, "MOST_CPU": 2, "SAMPLE_US": 100.0}.items():
        monkeypatch.setattr(measured, name, less)
    forget()
    yield
    forget()


def forget() -> None:
    """As a new process would begin."""
    planning._plan_for.cache_clear()
    run.forget()
    measured._later.clear()


def question(m=20, dtype=torch.float32, **more):
    return planning.problem(m, 24, 40, SPANS, dtype, True, Needs(), **more)


def plan(m=20, dtype=torch.float32, needs=None, **more):
    return planning.plan_for(m, 24, 40, SPANS, dtype, True, needs or Needs(), CPU, **more)


def by_model():
    return ranked(question(), ceilings(CPU, torch.float32))[0].plan


def as_if(monkeypatch, favourite):
    """A clock by which the plans that are a ``favourite`` take next to nothing; what it timed."""
    ran = []

    def race(plans, time_us, rounds, most):
        ran.append(plans)
        return {n: 1.0 if favourite(n) else 100.0 + i for i, n in enumerate(plans)}

    monkeypatch.setattr(measured, "time_candidates", race)
    return ran


def test_the_fastest_is_taken_and_kept(monkeypatch):
    ran = as_if(monkeypatch, lambda name: name.startswith("merge/separate"))
    assert str(plan()).startswith("merge/separate") and plan().time_us == 1.0
    assert len(ran) == 1
    forget()
    ran = as_if(monkeypatch, lambda name: name.startswith("separate/"))
    assert str(plan()).startswith("merge/separate") and not ran  # from the disk


def test_by_the_real_clock_it_is_the_same_in_every_process():
    first = plan()
    row = next(iter(json.loads(measured.path().read_text()).values()))
    assert row["m"] == 20 and min(row["time_us"], key=row["time_us"].get) == str(first)
    forget()
    assert plan() == first


@pytest.mark.parametrize("bordered", [False, True])
def test_plans_that_differ_by_what_they_keep_share_a_forward(bordered):
    asked = question(2000, context=FusionContext(bordered=bordered))
    found = {str(each): measured.parts(asked, each) for each in candidates(asked)}
    hidden, nothing = found["separate/merge/rank/hidden"], found["separate/merge/rank/nothing"]
    assert (hidden[0] == nothing[0]) == (not bordered)  # out of a buffer h is copied to be kept
    assert hidden[1] != nothing[1]
    assert found["merge/merge/full/merged"][0] == found["merge/merge/full/nothing"][0]
    assert found["bordered/merge/rank/hidden"][0] != found["bordered/merge/rank/nothing"][0]


def test_every_strategy_is_timed():
    plan()
    (row,) = json.loads(measured.path().read_text()).values()
    parts = [name.split("/") for name in row["time_us"]]
    assert {p[0] for p in parts} == {p[1] for p in parts} == {"separate", "bordered", "merge"}
    assert {p[2] for p in parts} == {"rank", "full"}


@pytest.mark.parametrize(
    "changes",
    [
        {"m": 200},
        {"needs": Needs(x=False)},
        {"needs": Needs(b=False)},
        {"traits": AdapterTraits("bfloat16")},
        {"keep": Keep.HIDDEN},
        {"impl": Impl.ATEN},
        {"dtype": torch.bfloat16},
        {"context": FusionContext(bordered=True)},
    ],
    ids=str,
)
def test_another_question_is_timed_anew(monkeypatch, changes):
    ran = as_if(monkeypatch, lambda name: False)
    plan()
    plan(**changes)
    assert len(ran) == 2


def test_nearby_numbers_of_rows_are_of_one_class(monkeypatch):
    ran = as_if(monkeypatch, lambda name: False)
    for m in (1025, 1100, 1280):
        plan(m)
    assert len(ran) == 1
    classes = {0: 0, 1: 1, 7: 7, 8: 8, 9: 10, 1024: 1024, 1025: 1280, 25216: 28672}
    assert {m: measured.shape_class(m) for m in classes} == classes


def test_the_model_chooses_where_it_is_asked_to(monkeypatch):
    ran = as_if(monkeypatch, lambda name: name.startswith("merge"))
    monkeypatch.setenv("FUSED_LORA_PLAN", "model")
    assert plan() == by_model()
    monkeypatch.delenv("FUSED_LORA_PLAN")
    assert measured.timing_mode(CPU) is TimingMode.MODEL and measured.times_plans(
        torch.device("cuda")
    )
    assert not ran and not measured.path().exists()


@pytest.mark.parametrize("moment", ["capture", "compile", "fake"])
def test_in_a_capture_or_a_trace_the_model_decides_and_nothing_is_kept(monkeypatch, moment):
    ran = as_if(monkeypatch, lambda name: name.startswith("merge/separate"))
    within = FakeTensorMode() if moment == "fake" else nullcontext()
    with monkeypatch.context() as patch, within:
        if moment == "capture":
            patch.setattr(measured, "why_not_now", lambda device: "a capture")
        elif moment == "compile":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert plan() == by_model()
    assert not ran and not measured.path().exists()
    assert str(plan()).startswith("merge/separate")  # afterwards it is timed
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(measured, "why_not_now", lambda device: "a capture")
        assert str(plan()).startswith("merge/separate")  # what is known serves there too


def test_a_full_memory_is_the_models_decision_for_a_while(monkeypatch):
    tried = []

    def full(*args):
        tried.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measured, "_race", full)
    now = measured.time.monotonic()
    monkeypatch.setattr(measured.time, "monotonic", lambda: now)
    for _ in range(3):
        planning._plan_for.cache_clear()
        assert plan() == by_model()
    assert len(tried) == 1 and not measured.path().exists()
    now += measured.AGAIN_S
    planning._plan_for.cache_clear()
    plan()
    assert len(tried) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"time_us": {}},
        {"time_us": {"separate/separate/rank/hidden": -1}},
        {"time_us": {"separate/separate/rank/hidden": "soon"}},
        {"time_us": {"a plan of another time": 1.0}},
        {"time_us": None},
    ],
    ids=str,
)
def test_rows_that_are_odd_are_timed_anew(monkeypatch, change):
    first = str(plan())
    rows = json.loads(measured.path().read_text())
    measured.path().write_text(json.dumps({key: row | change for key, row in rows.items()}))
    forget()
    ran = as_if(monkeypatch, lambda name: name == first)
    assert str(plan()) == first and len(ran) == 1


def test_precision_goes_before_time(monkeypatch):
    """In 16 bits: MERGE only where nothing else is affordable, one rounding for a tenth more."""

    def time_of(name: str) -> float:
        return 70.0 if "merge" in name else 95.0 if name.startswith("separate") else 100.0

    low = question(dtype=torch.bfloat16)
    timed = [replace(p, time_us=time_of(str(p))) for p in candidates(low)]
    assert ordered(low, timed)[0].plan.forward in ROUNDS_ONCE
    monkeypatch.setattr(
        measured, "time_candidates", lambda plans, *_: {n: time_of(n) for n in plans}
    )
    found = plan(dtype=torch.bfloat16)
    assert found.forward in ROUNDS_ONCE and found.dx is not Forward.MERGE


@pytest.mark.parametrize("needs", [Needs(), Needs(x=False), Needs(a=False, b=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [FusionContext(), FusionContext(bordered=True)], ids=str)
def test_every_plan_that_there_is_can_be_timed(needs, dtype, context):
    more = (needs, context, AdapterTraits("float32", (True,)))
    asked = planning.problem(9, 24, 40, SPANS, dtype, True, *more)
    for row in ranked(asked, ceilings(CPU, dtype)):
        assert measured.rehearse(asked, row.plan, "cpu") == str(row.plan)


def test_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    plan()
    assert torch.equal(torch.get_rng_state(), before)


def test_explain_shows_what_was_measured_beside_the_estimate():
    model = build()
    fused_lora.patch(model, 4)
    x = images(build())
    said = fused_lora.explain(model, len(x))
    assert "measured;" not in said and not measured.path().exists()  # nobody is timed to explain
    model(x).mean().backward()
    assert "measured; estimated" in fused_lora.explain(model, len(x))


def test_a_program_is_built_by_time_and_a_warm_step_asks_nobody(monkeypatch):
    model = build()
    fused_lora.patch(model, 4)
    model(images(build())).mean().backward()
    timed = measured.count()
    assert timed > 0
    monkeypatch.setattr(measured, "times_plans", lambda device: 1 / 0)
    model(images(build())).mean().backward()
    assert measured.count() == timed
