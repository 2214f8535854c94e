"""What is recorded is what runs: calls, views, writes in place, what is saved, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fused_lora.programs import run
from fused_lora.programs.program import InputSpec, build
from fused_lora.programs.record import CannotRecord, opaque


@dataclass(frozen=True)
class Op:
    """An operation of two functions; hashed by them."""

    ahead: Any
    back: Any = field(default=None)

    def forward(self, inputs, needs):
        return self.ahead(*inputs)

    def backward(self, saved, grads, needs):
        return self.back(*saved[0], *grads)


def given(*tensors, grad=False):
    return [None if t is None else InputSpec.of(t, grad) for t in tensors]


def test_calls_nobody_reads_are_gone_and_views_are_taken_once():
    def ahead(x, w):
        x.t()
        torch.exp(x)
        y = x.view(4, 6).view(24).view(4, 6) @ w.t()
        return y[:, :] + x.view(4, 6) @ w.t(), ((), None)

    x, w = torch.randn(4, 6), torch.randn(3, 6)
    program = build(Op(ahead), given(x, w))
    names = [call.target.__name__ for call in program.calls]
    assert names == ["linear", "linear", "add.Tensor"]
    assert program.text.count("linear(") == 2 and "exp" not in program.text
    assert torch.equal(program.forward(x, w), ahead(x, w)[0])


def test_a_copy_in_its_own_dtype_stays_a_copy():
    """``to`` would hand out the tensor itself, to be written to."""

    def ahead(x):
        return torch.ops.aten._to_copy(x, dtype=torch.float32).add_(1.0), ((), None)

    x = torch.zeros(3)
    program = build(Op(ahead), given(x))
    assert torch.equal(program.forward(x), torch.ones(3)) and not x.any()


def test_writes_in_place_through_views_are_kept_in_order():
    def ahead(x):
        y = torch.zeros_like(x)
        y[:, :2].copy_(x[:, :2])
        y[:, 1:].add_(x[:, 1:], alpha=2.0)
        z = y.clone()
        y.mul_(0.0)
        return z, ((), None)

    x = torch.randn(3, 4)
    assert torch.equal(build(Op(ahead), given(x)).forward(x), ahead(x)[0])


def test_what_is_saved_is_what_backward_reads():
    def ahead(x, w, unread):
        h = x.view(-1, 4) @ w
        return h.exp().view(2, 3, 5), ((x, w, h, unread), None)

    def back(x, w, h, unread, dy):
        dh = dy.view(-1, 5) * h.exp()
        return (dh @ w.t()).view(x.shape), x.view(-1, 4).t() @ dh, None

    tensors = [torch.randn(2, 3, 4), torch.randn(4, 5), torch.randn(7)]
    x, w, unread = (t.double().requires_grad_() for t in tensors)
    program = build(Op(ahead, back), given(x, w, unread, grad=True))
    shapes = [value.shape for value in program.saved]
    assert sorted(shapes) == [(2, 3, 4), (4, 5), (6, 5)]
    call = lambda x, w: run.call(Op(ahead, back), (x, w, unread.detach()))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, w))


def test_a_write_to_a_saved_input_is_seen():
    def ahead(x):
        return (x.view(-1) * 2).exp().view(x.shape), ((x,), None)

    def back(x, dy):
        return ((x.view(-1) * 2).exp() * 2 * dy.view(-1)).view(x.shape)

    leaf = torch.randn(2, 3, requires_grad=True)
    x = leaf * 1
    y = run.call(Op(ahead, lambda *given: (back(*given),)), (x,))
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "reads", [torch.Tensor.item, float, torch.nonzero], ids=["item", "float", "nonzero"]
)
def test_what_reads_numbers_has_no_program_and_runs_as_written(reads):
    def ahead(x):
        reads(x)
        return x * 2, ((), None)

    x = torch.ones(1)
    with pytest.raises(CannotRecord):
        build(Op(ahead), given(x))
    assert torch.equal(run.call(Op(ahead), (x,)), x * 2)


def test_a_tensor_from_elsewhere_is_refused():
    outside = torch.ones(3)
    with pytest.raises((CannotRecord, AssertionError, RuntimeError)):
        build(Op(lambda x: (x + outside, ((), None))), given(torch.ones(3)))


def test_an_operation_that_writes_to_its_inputs_is_refused():
    with pytest.raises(CannotRecord, match="writes to an input"):
        build(Op(lambda x: (x.add_(1.0) * 2, ((), None))), given(torch.ones(3)))


def test_an_output_that_is_an_input_is_refused():
    with pytest.raises(CannotRecord, match="is an input"):
        build(Op(lambda x: (x.view(3), ((), None))), given(torch.ones(3)))


def test_opaque_calls_are_called_with_tensors_and_constants():
    seen = []

    def target(x, out, how):
        seen.append(how)
        out.copy_(x + how["by"])

    def ahead(x):
        out = torch.empty_like(x)
        opaque(target, lambda *_: None, x, out, {"by": 3.0}, writes=[out])
        return out, ((), None)

    x = torch.randn(4)
    program = build(Op(ahead), given(x))
    assert program.launches and not seen
    assert torch.equal(program.forward(x), x + 3) and seen == [{"by": 3.0}]


def test_inputs_that_are_absent_are_no_arguments():
    def ahead(x, bias, w):
        assert bias is None
        return x @ w, ((x, w), None)

    def back(x, w, dy):
        return dy @ w.t(), None, x.t() @ dy

    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    y = run.call(Op(ahead, back), (x, None, w))
    mine, theirs = (torch.autograd.grad(z.square().sum(), (x, w)) for z in (y, x @ w))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(run, "MOST", 3)
    run.forget()
    op = Op(lambda x: (x * 2, ((), None)))
    for n in (1, 2, 3, 4, 5, 1, 2):
        x = torch.randn(n)
        assert torch.equal(run.call(op, (x,)), x * 2)
        assert len(run.programs()) <= 3


def test_switched_off_it_runs_as_written(monkeypatch):
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    run.forget()
    op = Op(lambda x: (x * 2, ((), None)))
    run.call(op, (torch.ones(2),))
    assert not run.programs()


def test_sizes_that_never_come_again_are_not_built_for(monkeypatch):
    monkeypatch.setattr(run, "SIZES", 3)
    monkeypatch.setattr(run, "OFTEN", 4)
    run.forget()
    op = Op(lambda x: (x * 2, ((), None)))
    for n in (*range(1, 10), 9, 9, 9, 9):
        x = torch.randn(n)
        assert torch.equal(run.call(op, (x,)), x * 2)
    assert sorted(p.given[0].shape for p in run.programs()) == [(1,), (2,), (3,), (9,)]


def test_what_holds_for_the_moment_is_not_remembered():
    import fused_lora
    from fused_lora.bench.suites.host import Operations
    from tests.patching.models import build as vit
    from tests.patching.models import images

    run.forget()
    model = vit().train()
    fused_lora.patch(model, rank=4)
    x = images(model)
    with Operations():
        model(x)
    assert not run.programs()
    model(x)
    assert len(run.programs()) == 3  # the first block's x asks for no gradient


class Launch:
    """A call that takes where tensors begin, as a kernel's launch does, and has their strides."""

    __name__ = "launch"
    launches = 1

    def __init__(self, by_address: bool) -> None:
        self.by_address = by_address

    def __call__(self, a, half, out) -> None:
        shown = a.as_strided((6, 4), (1, 6)), half.as_strided((4, 3), (6, 1))
        torch.mm(*shown, out=out)


@pytest.mark.parametrize("by_address", [True, False], ids=["by address", "by tensor"])
def test_a_view_is_not_made_for_who_takes_an_address(by_address):
    """But where it shows less, its bytes are what is read, and where it begins elsewhere."""

    def ahead(a, w):
        out = a.new_empty(6, 3)
        with torch.no_grad():
            launch = Launch(by_address)
            opaque(launch, lambda *_: None, a.t(), w[:, 3:], out, writes=[out])
        return out, ((), None)

    a, w = torch.randn(4, 6), torch.randn(4, 6)
    program = build(Op(ahead), given(a, w))
    names = [call.target.__name__ for call in program.calls]
    views = ["slice.Tensor"] if by_address else ["t.default", "slice.Tensor"]
    assert sorted(names) == sorted(["new_empty.default", "launch", *views])
    assert torch.equal(program.forward(a, w), a.t() @ w[:, 3:])
    (call,) = (call for call in program.calls if call.target.__name__ == "launch")
    assert [value.nbytes for value in call.reads] == [96, 48, 72]


def test_memory_is_asked_for_in_the_shortest_call():
    def ahead(x):
        views = x.view(24)  # which only memory is asked like
        made = [views.new_empty(3, 4), views.new_empty((5,), dtype=torch.bfloat16)]
        made += [torch.empty_like(x, dtype=torch.float64), torch.empty_like(x.t()), x.new_empty(())]
        return tuple(made), ((), None)

    x = torch.randn(4, 6)
    program = build(Op(ahead), given(x))
    assert "v0.new_empty(3, 4)" in program.text and "v0.new_empty(5, dtype=" in program.text
    assert "view" not in program.text and program.text.count("pin_memory") == 1  # of the scalar
    for ours, theirs in zip(program.forward(x), ahead(x)[0], strict=True):
        assert ours.shape == theirs.shape and ours.dtype is theirs.dtype
        assert ours.stride() == theirs.stride() and ours.device == theirs.device
