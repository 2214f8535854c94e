"""Calls that read inputs alone are made once and joined, and calls that may wait are joined late;
what others read stays where it is."""

from __future__ import annotations

import pytest
import torch

from fused_lora.programs import run
from fused_lora.programs.describe import is_view, name_of
from fused_lora.programs.program import build
from fused_lora.programs.record import opaque
from tests.programs.test_record import Op, given


class Doubling:
    """Writes twice each of its sources to each of its targets."""

    def __init__(self, keeps, kind="doubling", pieces=1):
        self.keeps, self.kind, self.pieces = keeps, kind, pieces
        self.__name__ = "doubling"

    def joined(self, others):
        assert all(each.kind == self.kind for each in others)
        return Doubling(self.keeps, self.kind, 1 + len(others))

    def __call__(self, sources, outs):
        assert len(sources) == len(outs) == self.pieces
        for source, out in zip(sources, outs, strict=True):
            torch.mul(source, 2, out=out)


def doubled(t, keeps=None, kind="doubling"):
    out = t.new_empty(t.shape)
    opaque(Doubling(keeps, kind), lambda *_: None, (t,), (out,), writes=[out])
    return out


def operation(keeps, middle=lambda w: w, kinds=("doubling", "doubling")):
    """y = x 4 v w, elementwise, from doubled v and w."""

    def ahead(x, v, w):
        first = x * doubled(v, keeps, kinds[0])
        return first * doubled(middle(w).t(), keeps, kinds[1]).t(), ((x, v, w), None)

    def back(x, v, w, dy):
        v2, w2 = doubled(v, keeps, kinds[0]), doubled(middle(w).t(), keeps, kinds[1]).t()
        return dy * v2 * w2, 2 * dy * x * w2, 2 * dy * x * v2

    return Op(ahead, back)


def counts(program):
    return [
        [call.target.pieces for call in calls if isinstance(call.target, Doubling)]
        for calls in (program.calls, program.calls_back)
    ]


def operands():
    return [torch.randn(3, 3, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("keeps, expected", [(True, [[2], []]), (False, [[2], [2]])])
def test_one_call_of_all_pieces_kept_where_it_may_be(keeps, expected):
    ours, tensors = operation(keeps), operands()
    program = build(ours, given(*tensors, grad=True))
    assert counts(program) == expected
    made = {id(out) for call in program.calls for out in call.outs}
    assert sum(id(value) in made for value in program.saved) == 2 * keeps
    y, truth = run.call(ours, tensors), tensors[0] * 2 * tensors[1] * 2 * tensors[2]
    torch.testing.assert_close(y, truth)
    for one, other in zip(
        *(torch.autograd.grad(z.sum(), tensors) for z in (y, truth)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("written", [1, 2])
def test_a_write_to_what_was_prepared_is_seen(written):
    leaves = operands()
    tensors = [leaf * 1 for leaf in leaves]
    ours = operation(True)
    y = run.call(ours, tensors)
    with torch.no_grad():
        tensors[written].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_of_two_kinds_each_is_one_and_what_is_computed_is_left_alone():
    tensors = operands()
    two = build(operation(True, kinds=("doubling", "twice")), given(*tensors, grad=True))
    assert counts(two) == [[1, 1], []]
    computed = build(operation(True, middle=lambda w: w.exp()), given(*tensors, grad=True))
    assert counts(computed) == [[1, 1], [1]]
    plain = build(operation(None), given(*tensors, grad=True))
    assert counts(plain) == [[1, 1], [1, 1]]


def test_the_same_memory_is_prepared_once():
    def ahead(x, w):
        return x * doubled(w, False) * doubled(w, False) * doubled(w[:], False), ((), None)

    x, w = torch.randn(3, 3), torch.randn(3, 3)
    program = build(Op(ahead), given(x, w))
    assert counts(program)[0] == [1]
    torch.testing.assert_close(program.forward(x, w), x * (2 * w) ** 3)


class Halving:
    """Writes half of each source to its target, later if it may; up to three pieces at once."""

    waits = True
    __name__ = "halving"

    def __init__(self, kind="halving", pieces=1):
        self.kind, self.pieces = kind, pieces

    def joined(self, others):
        assert all(each.kind == self.kind for each in others)
        pieces = self.pieces + sum(each.pieces for each in others)
        return Halving(self.kind, pieces) if pieces <= 3 else None

    def __call__(self, tensors):
        assert len(tensors) == 2 * self.pieces
        for source, out in zip(tensors[::2], tensors[1::2], strict=True):
            torch.div(source, 2, out=out)


def halved(t, out=None, kind="halving"):
    out = t.new_empty(t.shape) if out is None else out
    opaque(Halving(kind), lambda *_: None, (t, out), writes=[out])
    return out


def order(ahead, *tensors):
    """Names of what is called, with how many pieces; the results are those of what is written."""
    program = build(Op(ahead), given(*tensors))
    ours, plain = program.forward(*tensors), ahead(*tensors)[0]
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)
    made = [call for call in program.calls if not is_view(call)]
    names = [name_of(call) + str(getattr(call.target, "pieces", "")) for call in made]
    return [name for name in names if name != "new_empty"]


def test_what_may_wait_is_one_call_where_the_last_stood():
    def ahead(x, w):
        first = halved(x)
        y = w.exp()
        second = halved(y)
        return (first, y.sin(), second, halved(w), x.cos()), ((), None)

    x, w = torch.randn(3, 3), torch.randn(3, 3)
    assert order(ahead, x, w) == ["exp", "sin", "halving3", "cos"]


@pytest.mark.parametrize("count", [3, 4, 7])
def test_pieces_beyond_what_one_call_holds_are_the_next(count):
    def ahead(x):
        return tuple(halved(x + i) for i in range(count)), ((), None)

    names = order(ahead, torch.randn(3))
    assert [name for name in names if name != "add"] == {
        3: ["halving3"],
        4: ["halving3", "halving1"],
        7: ["halving3", "halving3", "halving1"],
    }[count]


def test_nothing_waits_for_its_reader():
    def ahead(x, w):
        first, second = halved(x), halved(w)
        y = second.exp()
        third = halved(y)
        return (first, y, third, halved(third)), ((), None)

    x, w = torch.randn(3, 3), torch.randn(3, 3)
    assert order(ahead, x, w) == ["halving2", "exp", "halving1", "halving1"]


def test_nothing_waits_beyond_a_write_to_what_it_reads_or_writes():
    def source(x):
        y = x.exp()
        first = halved(y)
        y.zero_()
        return (first, halved(x), y), ((), None)

    def target(x):
        out = x.new_empty(x.shape)
        first = halved(x, out)
        out.zero_()
        return (first, halved(x)), ((), None)

    def both(x):
        out = x.new_empty(x.shape)
        halved(x, out)
        halved(x.exp(), out)  # again
        return (out,), ((), None)

    x = torch.randn(3)
    assert order(source, x) == ["exp", "halving1", "zero_", "halving1"]
    assert order(target, x) == ["halving1", "zero_", "halving1"]
    assert order(both, x) == ["halving1", "exp", "halving1"]


def test_a_view_is_no_reader_and_parts_of_one_memory_are():
    def views(x):
        first = halved(x)
        turned = first.t()
        return (turned, halved(x.cos()), turned.exp()), ((), None)

    def parts(x):
        out = x.new_empty(x.shape)
        return (halved(x[0], out[0]), halved(x[1], out[1])), ((), None)

    x = torch.randn(2, 3)
    assert order(views, x) == ["cos", "halving2", "exp"]
    assert order(parts, x) == ["halving1", "halving1"]


def test_two_kinds_wait_each_for_its_own():
    def ahead(x):
        kinds = ("one", "two", "one", "two")
        return tuple(halved(x + i, None, kind) for i, kind in enumerate(kinds)), ((), None)

    names = order(ahead, torch.randn(3))
    assert names == ["add"] * 3 + ["halving2", "add", "halving2"]
