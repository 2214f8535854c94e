"""Halves of a block whose gradients form LayerNorm's output as they read its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_lora.kernels.aten import elementwise as aten
from fused_lora.kernels.cuda.native import Chip
from fused_lora.ops import elementwise
from fused_lora.ops.chain import linear
from fused_lora.ops.lora_block import layer_norm_lora_linear, lora_attention, lora_mlp
from fused_lora.ops.operand import RECOMPUTE, Adapted, Norm
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.verify import launch_checks
from fused_lora.verify.kernel_registry import of_compiled_grads
from tests.ops.block_problems import (
    matrix,
    norm,
    plain_attention,
    plain_linear,
    plain_mlp,
    plain_norm,
)

from .serving import Served, forget, narrow, one_element, served  # noqa: F401

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
D, H, HEADS = 24, 40, 3
HALVES = ("mlp", "gated", "attention", "linear")


@pytest.fixture
def again(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """What makes n; kernels serve at once."""
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    made: list[str] = []

    def composed(x, gamma, beta, eps, out=None):
        """With statistics in fp32, which those of a CPU are not where they are fake tensors."""
        made.append("n")
        mean, rstd = x.float().mean(1), (x.float().var(1, correction=0) + eps).rsqrt()
        n = aten.layer_norm_rebuild(x, gamma, beta, mean, rstd, out)
        return aten.Normed(n, mean, rstd)

    def rebuild(*given, **how):
        made.append("n of its statistics")
        return aten.layer_norm_rebuild(*given, **how)

    monkeypatch.setattr(elementwise, "layer_norm_forward", composed)
    monkeypatch.setattr(elementwise, "layer_norm_rebuild", rebuild)
    return made


class Half:
    """One half with a LayerNorm before it, 38 rows."""

    def __init__(self, which: str, vectors: str = "both", trains: bool = False) -> None:
        torch.manual_seed(3)
        how: dict[str, Any] = dict(dtype=BF16, w=False, bias=False)
        before = norm(D, BF16, trains)
        gamma = before.gamma if vectors in ("both", "gamma") else None
        self.norm = Norm(gamma, before.beta if vectors in ("both", "beta") else None, 1e-6)
        self.which, self.x = which, torch.randn(2, 19, D).to(BF16).requires_grad_()
        sizes = {
            "mlp": [(H, D, 6, 1), (D, H, 5, 1)],
            "gated": [(H, D, 6, 1), (H, D, 4, 1), (D, H, 5, 1)],
            "attention": [(3 * D, D, 4, 3), (D, D, 5, 1)],
            "linear": [(H, D, 6, 1)],
        }
        self.linears = [matrix(*size, **how) for size in sizes[which]]

    def __call__(self, recompute: str, impl: str) -> dict[str, Tensor]:
        """y and every gradient by name."""
        linears = [one._replace(impl=impl) for one in self.linears]
        x, before = self.x, self.norm
        if self.which == "attention":
            y = lora_attention(x, before, *linears, HEADS, recompute=recompute)
        elif self.which == "linear":
            y = layer_norm_lora_linear(x, before, *linears, recompute)
        else:
            first = tuple(linears[:-1]) if self.which == "gated" else linears[0]
            act = "silu" if self.which == "gated" else "gelu"
            how = dict(norm=before, around=True, recompute=recompute)
            y = lora_mlp(x, first, linears[-1], act, **how)
        return self.named(y, x, before, linears)

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same in plain torch."""
        x, before, linears = self.leaves(dtype)
        if self.which == "attention":
            y = plain_attention(x, before, *linears, HEADS)
        elif self.which == "linear":
            y = plain_linear(plain_norm(x, before), *linears)
        else:
            first = tuple(linears[:-1]) if self.which == "gated" else linears[0]
            act = "silu" if self.which == "gated" else "gelu"
            y = x + plain_mlp(plain_norm(x, before), first, linears[-1], act, None)
        return self.named(y, x, before, linears)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Norm, list[Adapted]]:
        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

        before = Norm(leaf(self.norm.gamma), leaf(self.norm.beta), self.norm.eps)
        linears = [
            one._replace(
                w=leaf(one.w), bias=leaf(one.bias), a=[*map(leaf, one.a)], b=[*map(leaf, one.b)]
            )
            for one in self.linears
        ]
        return leaf(self.x), before, linears

    @staticmethod
    def named(y: Tensor, x: Tensor, before: Norm, linears: list[Adapted]) -> dict[str, Tensor]:
        asked = {"x": x, "gamma": before.gamma, "beta": before.beta}
        for i, one in enumerate(linears):
            asked |= {f"a{i}{g}": t for g, t in enumerate(one.a)}
            asked |= {f"b{i}{g}": t for g, t in enumerate(one.b)}
        asked = {name: t for name, t in asked.items() if t is not None and t.requires_grad}
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape).cos().to(y.dtype)
        grads = torch.autograd.grad(y, list(asked.values()), weight)
        return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}

    def keeps_the_yardstick(self, ours: dict[str, Tensor]) -> None:
        """Beside float64 and plain torch."""
        theirs = in_every_order(lambda: self.plain(BF16))
        verdict = judge_all(ours, theirs, self.plain(F64), BF16)
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("programs", [0, 1])
@pytest.mark.parametrize("which", HALVES)
def test_every_gradient(served, again, monkeypatch, which, programs, recompute) -> None:  # noqa: F811
    """n is made once, in forward; again where what is behind it is; kept where that is asked."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", str(programs))
    half = Half(which)
    for _ in range(2):  # a program's launches are bound from its second run on
        half.keeps_the_yardstick(half(recompute, "cuda"))
    formed = recompute == "elementwise" or (which, recompute) == ("linear", "gemm")
    frames, calls = 2 if which == "gated" else 1, 1 if programs else 2
    assert served.normed == formed * frames * calls
    assert again == ["n"] * (calls * (2 if again_in(which, recompute) else 1))


def again_in(which: str, recompute: str) -> bool:
    """Whether qkv or fc1 runs again, and n before it."""
    return recompute == "gemm" and which != "linear"


@pytest.mark.parametrize("programs", [0, 1])
@pytest.mark.parametrize("which", HALVES)
def test_the_bits_are_those_of_an_n_made_again(served, again, monkeypatch, which, programs):  # noqa: F811
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", str(programs))
    half = Half(which, trains=True)
    formed = half("elementwise", "cuda")
    assert served.normed
    monkeypatch.setattr("fused_lora.ops.chain.linear.why_not_normed", lambda *_: "not now")
    forget()
    served.normed = 0
    there = half("elementwise", "cuda")
    assert not served.normed and again == ["n", "n", "n"]
    assert all(torch.equal(formed[name], t) for name, t in there.items())


@pytest.mark.parametrize("which", ["mlp", "attention"])
@pytest.mark.parametrize("vectors", ["both", "gamma", "beta", "none"])
@pytest.mark.parametrize("trains", [False, True])
def test_of_every_norm(served, again, which, vectors, trains) -> None:  # noqa: F811
    """Its own parameters train or not, are there or not."""
    half = Half(which, vectors, trains)
    half.keeps_the_yardstick(half("elementwise", "cuda"))
    assert served.normed == 1 and again == ["n"]


@pytest.mark.parametrize("frozen", ["a", "b", "x"])
@pytest.mark.parametrize("which", ["mlp", "attention"])
def test_what_does_not_train(served, again, which, frozen) -> None:  # noqa: F811
    """Where a of the linear behind does not, nobody reads n."""
    half = Half(which)
    for t in [half.x] if frozen == "x" else getattr(half.linears[0], frozen):
        t.requires_grad_(False)
    half.keeps_the_yardstick(half("elementwise", "cuda"))
    assert again == ["n"]


@pytest.mark.parametrize("which", ["mlp", "attention"])
def test_where_the_gradient_of_w_reads_n(served, again, which) -> None:  # noqa: F811
    half = Half(which)
    half.linears[0].w.requires_grad_()
    half.keeps_the_yardstick(half("elementwise", "cuda"))
    assert served.normed == 0 and again == ["n"] * 2


def test_a_wide_stream_under_autocast_has_n_made_again(served, again) -> None:  # noqa: F811
    half = Half("mlp")
    half.x = half.x.detach().float().requires_grad_()
    with torch.autocast("cpu", BF16):
        half.keeps_the_yardstick(half("elementwise", "cuda"))
    assert served.runs and served.normed == 0 and again == ["n"] * 2


@pytest.mark.parametrize("which", ["mlp", "attention"])
def test_gamma_that_begins_anywhere_has_n_made_again(served, again, monkeypatch, which):  # noqa: F811
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")  # which on a CPU take all to begin at 16 bytes
    half = Half(which)
    half.norm = half.norm._replace(gamma=torch.randn(D + 1).to(BF16)[1:])
    half.keeps_the_yardstick(half("elementwise", "cuda"))
    assert served.normed == 0 and again == ["n"] * 2


@pytest.mark.parametrize("which", HALVES)
def test_a_backward_that_cannot_makes_n_again(served, again, monkeypatch, which) -> None:  # noqa: F811
    """As in a capture, where nothing is checked: what forward kept for it is not missed."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    right, answers = linear.why_not_normed, []

    def at_first(*question):
        answers.append(right(*question) if len(answers) < frames else "not now")
        return answers[-1]

    half, frames = Half(which), 2 if which == "gated" else 1
    monkeypatch.setattr(linear, "why_not_normed", at_first)
    half.keeps_the_yardstick(half("elementwise", "cuda"))
    assert served.normed == 0 and again == ["n", "n"]


@pytest.mark.parametrize("programs", [0, 1])
@pytest.mark.parametrize("written", ["x", "gamma", "beta", "a"])
def test_a_write_between_the_two_is_refused(served, again, monkeypatch, programs, written):  # noqa: F811
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", str(programs))
    half = Half("mlp")
    x, first = half.x.detach(), half.linears[0]
    both = [one._replace(impl="cuda") for one in half.linears]
    for _ in range(2):
        y = lora_mlp(x, *both, norm=half.norm, around=True)
        y.sum().backward(retain_graph=True)
    y = lora_mlp(x, *both, norm=half.norm, around=True)
    one = {"x": x, "gamma": half.norm.gamma, "beta": half.norm.beta, "a": first.a[0]}[written]
    with torch.no_grad():
        one.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert served.normed


@pytest.mark.parametrize("which", ["mlp", "attention"])
def test_a_broken_kernel_has_n_made_again(served, again, monkeypatch, which) -> None:  # noqa: F811
    """A verdict of its own: gradients of an x that is there are served all the same."""
    monkeypatch.delenv("FUSED_LORA_VERIFY")
    half = Half(which)
    served.of, served.fault = "norm", one_element
    for _ in range(2):  # found out, then from the disk
        said = r"lora_grad_norm \(6 strips.*\) in bfloat16 .* over"
        with pytest.warns(RuntimeWarning, match=said):
            ours = half("elementwise", "cuda")
        half.keeps_the_yardstick(ours)
        assert served.normed == 0 and served.runs
        forget()


def test_its_statistics_are_kept_and_nothing_else(served, again, monkeypatch) -> None:  # noqa: F811
    """8 bytes a row, as frozen networks do."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    kept = {}
    for forms in (True, False):
        half = Half("mlp")
        if not forms:
            half.norm = half.norm._replace(gamma=torch.randn(D + 1).to(BF16)[1:])
        linears = [one._replace(impl="cuda") for one in half.linears]
        y = lora_mlp(half.x, *linears, norm=half.norm, around=True)
        saved = {t.untyped_storage() for t in y.grad_fn.saved_tensors if t is not None}
        own = {t.untyped_storage().data_ptr() for t in (half.norm.gamma, half.norm.beta)}
        kept[forms] = sum(s.nbytes() for s in saved if s.data_ptr() not in own)
    assert kept[True] - kept[False] == 2 * 4 * 38


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_right_kernels_pass_their_check(served, dtype) -> None:  # noqa: F811
    """In every form that few columns make up."""
    chip, name = Chip(90, 1), str(dtype).removeprefix("torch.")
    for form, example in narrow(chip, False).items():
        found = of_compiled_grads(form, example, name, "norm").check(torch.device("cpu"))
        assert found.passed and found.compared, (form, str(found))


def test_one_that_is_right_serves(served, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    half = Half("linear")
    half.keeps_the_yardstick(half("elementwise", "cuda"))
    assert served.checks and served.normed == 1


@pytest.mark.parametrize("wrong", ["gamma", "beta", "mean", "rstd"])
def test_what_leaves_a_part_out_is_caught(served, monkeypatch, wrong) -> None:  # noqa: F811
    right = launch_checks.lora_grads

    def broken(*given, norm=None, **how):
        neutral = (
            None if wrong in ("gamma", "beta") else torch.full_like(norm.mean, wrong == "rstd")
        )
        return right(*given, norm=norm._replace(**{wrong: neutral}), **how)

    monkeypatch.setattr(launch_checks, "lora_grads", broken)
    (form, example), *_ = narrow(Chip(90, 1), False).items()
    found = of_compiled_grads(form, example, "bfloat16", "norm").check(torch.device("cpu"))
    assert found.compared and not found.passed
