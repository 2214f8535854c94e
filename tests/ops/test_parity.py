"""Every strategy against float64, by the yardstick rule, on 500 random problems."""

import random
from collections import Counter

import pytest
import torch

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.ops.planning import problem as question_of
from fused_lora.plan.strategies import STRATEGIES, candidates, keeps_x
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Backend, Forward, FusionContext, Gradient, Keep, Needs
from tests.ops.problems import Problem, draw

PROBLEMS = 500
SHARDS = 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan_and_needs(seed: int, p: Problem):
    """A random consistent plan under a random subset of needed gradients."""
    rng = random.Random(seed)
    needs = Needs(*(rng.random() < chance for chance in (0.8, 0.3, 0.5, 0.8, 0.8)))
    needs = needs if p.bias is not None else Needs(needs.x, needs.w, False, needs.a, needs.b)
    (m, k), n = p.x.shape, p.w.shape[0]
    context = FusionContext(expanded=seed % 3 == 0, input_expanded=seed % 2 == 0)
    question = question_of(m, k, n, p.spans, p.x.dtype, p.bias is not None, needs, context)
    return rng.choice(candidates(question)), needs


def named(grads, needs):
    """(name, tensor) for every gradient asked for; an operand's adapters are judged together.

    Apart, an adapter of a single element would pit one random rounding error against another.
    """
    return [
        *([("dx", grads.x)] if needs.x else []),
        *([("dw", grads.w)] if needs.w else []),
        *([("dbias", grads.bias)] if needs.bias else []),
        *([("da", torch.cat([t.flatten() for t in grads.a]))] if needs.a else []),
        *([("db", torch.cat([t.flatten() for t in grads.b]))] if needs.b else []),
    ]


def reference_run(p: Problem, needs: Needs):
    """y and the gradients by the equations, in p's own dtype."""
    y = reference.forward(p.x, p.w, p.bias, p.a, p.b, p.scales, p.spans)
    grads = reference.backward(p.dy, p.x, p.w, p.a, p.b, p.scales, p.spans, needs)
    return [("y", y), *named(grads, needs)]


def full_run(p: Problem, needs: Needs):
    """Adapter gradients as plain torch has them of a merged weight: dw is rounded on the way."""
    dws = [p.dy[:, span.start : span.stop].T @ p.x for span in p.spans]
    da = [s * b.T @ dw for s, b, dw in zip(p.scales, p.b, dws, strict=True)]
    db = [s * dw @ a.T for s, a, dw in zip(p.scales, p.a, dws, strict=True)]
    return dict(named(Grads(None, None, None, da, db), Needs(x=False, a=needs.a, b=needs.b)))


def aten_run(p: Problem, plan, needs: Needs):
    """y and the gradients by ``plan``, given only what it says it keeps; what is open is closed."""
    adapters = Adapters(p.a, p.b, p.scales, p.spans)
    y, kept = aten.forward(p.x, p.w, p.bias, adapters, plan)
    if plan.forward is Forward.OPEN:
        z, h = aten.open_forward(p.x, p.w, p.bias, adapters)
        assert torch.equal(y, z)
        y = aten.expand(z, h, adapters)
    assert (kept is None) == (plan.keep is Keep.NOTHING)
    x = p.x if keeps_x(needs, plan) else None
    w = None if plan.keep is Keep.MERGED else p.w
    grads = aten.backward(p.dy, x, kept, w, adapters, needs, plan)
    assert (grads.dh is not None) == (needs.x and plan.dx is Forward.OPEN)
    if grads.dh is not None:
        grads = grads._replace(x=aten.expand_grad(grads.x, grads.dh, adapters))
    absent = [grads.x, grads.w, grads.bias, grads.a[0], grads.b[0]]
    assert [g is not None for g in absent] == [needs.x, needs.w, needs.bias, needs.a, needs.b]
    return [("y", y), *named(grads, needs)]


def check(seed: int, dtype: torch.dtype):
    p = draw(seed, dtype)
    plan, needs = plan_and_needs(seed, p)
    ours, truth = dict(aten_run(p, plan, needs)), dict(reference_run(p.double(), needs))
    plain = in_every_order(lambda: dict(reference_run(p, needs)))
    if plan.gradient is Gradient.FULL:
        plain += in_every_order(lambda: dict(reference_run(p, needs)) | full_run(p, needs))
    verdict = judge_all(ours, plain, truth, dtype)
    assert verdict.passed, f"problem {seed} {dtype} {plan} {verdict}"
    return plan


@pytest.mark.parametrize(
    "shard", [pytest.param(s, marks=pytest.mark.slow) if s > 3 else s for s in range(SHARDS)]
)
def test_every_strategy_is_within_the_yardstick(shard):
    for seed in range(shard, PROBLEMS, SHARDS):
        check(seed, DTYPES[seed % 3])


def test_the_problems_cover_every_strategy():
    seen = Counter()
    for seed in range(PROBLEMS):
        p = draw(seed, torch.float32)
        plan, _ = plan_and_needs(seed, p)
        seen.update([("forward", plan.forward), ("dx", plan.dx), plan.gradient, plan.keep])
    for part in [(side, f) for side in ("forward", "dx") for f in STRATEGIES[Backend.ATEN]]:
        assert seen[part] >= 40, (part, seen)
    for part in [Gradient.RANK, Gradient.FULL, Keep.HIDDEN, Keep.NOTHING]:
        assert seen[part] >= 40, (part, seen)
    assert seen[Keep.MERGED] >= 5, seen


@pytest.mark.gpu
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_strategy_is_within_the_yardstick_on_a_gpu(shard):
    with torch.device("cuda"):
        for seed in range(shard, PROBLEMS, SHARDS):
            check(seed, DTYPES[seed % 3])


def test_buffers_are_written_before_they_are_read(monkeypatch):
    """Uninitialised memory is NaN here: a sum that read its output first would show it."""
    p = draw(3, torch.float32)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *s: empty(t, *s).fill_(torch.nan))
    needs = Needs(bias=p.bias is not None)
    (m, k), n = p.x.shape, p.w.shape[0]
    for plan in candidates(question_of(m, k, n, p.spans, p.x.dtype, True, needs)):
        for name, value in aten_run(p, plan, needs):
            assert torch.isfinite(value).all(), (str(plan), name)
