"""Many merges at once are the merges of each, whoever serves them."""

import pytest
import torch

from fused_lora.ops import lora_merge as backends
from fused_lora.ops import lora_merge as module
from fused_lora.ops.lora_merge import Job, lora_merge, lora_merge_many
from fused_lora.types import Span

SPANS = (Span(0, 10, 3), Span(14, 20, 2))  # rows 10..13 are nobody's
NOISE = ("stochastic", 5)  # rounding and step


def job(dtype=torch.bfloat16, seed=7, low=torch.float32):
    a = [torch.randn(span.rank, 24).to(low) for span in SPANS]
    b = [torch.randn(span.width, span.rank).to(low) for span in SPANS]
    return Job(torch.randn(20, 24).to(dtype), a, b, (1.0, 0.5), SPANS, seed)


def alone(one, rounding="nearest", step=0):
    return lora_merge(*one[:5], rounding, one.seed, step)


def test_dtypes_and_seeds_of_every_kind():
    jobs = [job(), job(torch.float32), job(low=torch.bfloat16), job(seed=8), job(torch.float64)]
    merged = lora_merge_many(jobs)
    assert all(torch.equal(w, alone(one)) for w, one in zip(merged, jobs, strict=True))
    jobs = [job(), job(seed=8), job(torch.float16)]
    merged = lora_merge_many(jobs, *NOISE)
    assert all(torch.equal(w, alone(one, *NOISE)) for w, one in zip(merged, jobs, strict=True))
    assert lora_merge_many([]) == []


def test_layers_that_fit_share_a_launch(monkeypatch):
    seen = []

    def together(weights, adapters, noise):
        seen.append((len(weights), noise))
        return [w + 1 for w in weights]

    monkeypatch.setattr(module, "server_of_many", lambda *_: "triton")
    monkeypatch.setattr(module, "triton_many", together)
    jobs = [job(), job(torch.float16), job(seed=8), job(torch.float16)]
    merged = lora_merge_many(jobs)
    assert all(torch.equal(w, one.w + 1) for w, one in zip(merged, jobs, strict=True))
    assert seen == [(2, None), (2, None)]


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_kernel_that_cannot_serve_says_why(impl):
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot serve: "):
        lora_merge_many([job(), job()], impl=impl)


def test_the_first_that_serves_all_of_them(monkeypatch):
    class Weight:
        is_cuda = True

    reasons = {"cuda": "one of them is of another dtype", "triton": None}
    monkeypatch.setattr(backends, "why_not_many", lambda w, a, by: reasons[by])
    assert backends.server_of_many([Weight, Weight], [None, None], "auto") == "triton"
    reasons["triton"] = "it is not checked yet"
    assert backends.server_of_many([Weight, Weight], [None, None], "auto") == "aten"


@pytest.mark.parametrize(("rounding", "impl"), [("up", "auto"), ("nearest", "magic")])
def test_unknown_words(rounding, impl):
    with pytest.raises(ValueError, match="must be one of"):
        lora_merge_many([job()], rounding, impl=impl)
    with pytest.raises(ValueError, match="stochastic rounding serves"):
        lora_merge_many([job(torch.float32)], "stochastic")
