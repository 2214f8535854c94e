"""Calls that read inputs alone are made once and joined; what others read stays where it is."""

from __future__ import annotations

import pytest
import torch

from fused_lora.programs import run
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
