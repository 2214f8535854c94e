"""Dropout under torch.compile: the masks of eager calls, none of them kept, one graph for all."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_lora.nn import FusedLoRALinear
from fused_lora.ops import lora_shrink as ops
from fused_lora.ops.lora_shrink import shrink
from fused_lora.types import Backend

P = 0.4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(dtype=torch.float32, m=(3, 7), k=12, r=4, needs=(True, True)):
    x, a = torch.randn(*m, k, dtype=dtype), torch.randn(r, k, dtype=dtype)
    return x.requires_grad_(needs[0]), a.requires_grad_(needs[1])


def compiled(function=shrink, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def results(run, x, a, *more, seed=3):
    """h and the gradients asked for, of a run that begins at ``seed``."""
    torch.manual_seed(seed)
    h = run(x, a, *more)
    leaves = [t for t in (x, a) if t.requires_grad]
    return [h.detach(), *torch.autograd.grad(h.square().sum(), leaves)]


def same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_masks_and_gradients_of_eager_calls(dtype, needs):
    x, a = operands(dtype, needs=needs)
    same(results(compiled(), x, a, P), results(shrink, x, a, P))


@pytest.mark.slow
def test_by_inductor():
    x, a = operands()
    run = compiled(lambda x, a, p: shrink(x, a, p).sin() + 1, "inductor")
    theirs = results(lambda x, a, p: shrink(x, a, p).sin() + 1, x, a, P)
    same(results(run, x, a, P), theirs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not torch.equal(run(x, a, P), run(x, a, P))


def test_every_call_draws_and_the_seed_decides():
    x, a = operands()
    run = compiled()
    torch.manual_seed(1)
    first, second = run(x, a, P), run(x, a, P)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(shrink(x, a, P), first) and torch.equal(shrink(x, a, P), second)


def test_two_calls_on_the_same_operands_in_one_graph_draw_twice():
    x, a = operands()
    first, second = compiled(lambda x, a: (shrink(x, a, P), shrink(x, a, P)))(x, a)
    assert not torch.equal(first, second)


def test_one_graph_for_every_seed_and_number_of_rows():
    run = compiled(dynamic=True)
    for seed, m in enumerate((21, 5, 64, 5, 197)):
        x, a = operands(m=(m,))
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            same(results(run, x, a, P, seed=seed), results(shrink, x, a, P, seed=seed))


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0, 3), ()])
def test_leading_shapes_and_empty(shape):
    x, a = operands(m=shape)
    same(results(compiled(), x, a, P), results(shrink, x, a, P))


def test_strided_operands():
    x, a = torch.randn(12, 21).t(), torch.randn(12, 4).t()
    x, a = x.requires_grad_(), a.requires_grad_()
    same(results(compiled(), x, a, P), results(shrink, x, a, P))


def test_autocast():
    x, a = operands()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(run, x, a, P) for run in (compiled(), shrink))
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32]
    same(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_neither_mask_nor_a_second_x_is_kept(backend):
    x, a = operands(m=(300,), k=64)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    run = compiled(backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h = run(x, a, P)
    assert kept.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(kept.values()) <= a.nbytes + 2 * 8  # the seed, and who drew of it
    assert h.requires_grad


def test_checkpointed():
    x, a = operands()

    def twice(x, a, p):
        return checkpoint(lambda x: shrink(x.sin(), a, p).cos(), x, use_reentrant=False)

    same(results(compiled(twice), x, a, P), results(twice, x, a, P))


def test_a_layer():
    layer = FusedLoRALinear(12, 20, rank=4, dropout=P)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 12, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B)
    runs = []
    for run in (layer, compiled(layer)):
        torch.manual_seed(2)
        y = run(x)
        runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    same(*runs)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck(needs):
    x, a = operands(torch.float64, (21,), needs=needs)
    seed = torch.tensor(7)
    torch.library.opcheck(torch.ops.fused_lora.dropped_shrink.default, (x, a, seed, P))
    mask = torch.tensor((7, ops.MAKERS.index(Backend.ATEN)))
    rows = x.detach() if needs[1] else None
    arguments = (torch.randn(21, 4).double(), rows, a.detach(), mask, P, needs[0])
    torch.library.opcheck(torch.ops.fused_lora.dropped_shrink_backward.default, arguments)


def test_double_backward_fails_loudly():
    x, a = operands()
    h = torch.ops.fused_lora.dropped_shrink(x.flatten(0, 1), a, torch.tensor(3), P)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(h.sum(), x, create_graph=True)
