"""Rank-prefix training: the leading ranks compute and train, the rest is left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.nn import shared_parameters

THIRDS = {"q": (0, 8), "k": (8, 16), "v": (16, 24)}


def single(**options):
    return filled(FusedLoRALinear(12, 24, rank=5, **options))


def grouped(**options):
    ranks = {"q": 5, "k": 2, "v": 4}
    return filled(FusedLoRAGroupedLinear(12, 24, spans=THIRDS, rank=ranks, **options))


def filled(module):
    for _, b in module.adapters():
        nn.init.normal_(b)
    return module.double()


MAKERS = pytest.mark.parametrize("make", [single, grouped])


def truth(module, x, rank):
    """The equation on the leading ranks, and its gradients by autograd's slicing."""
    y = nn.functional.linear(x, module.weight, module.bias)
    pairs = zip(module.adapters(), module.scales, module.groups.values(), strict=True)
    terms = []
    for (a, b), s, span in pairs:
        term = s * (x @ a[:rank].T @ b[:, :rank].T)
        terms.append(nn.functional.pad(term, (span.start, 24 - span.stop)))
    y = y + sum(terms)
    halves = [half for pair in module.adapters() for half in pair]
    return y, torch.autograd.grad(y.square().sum(), halves)


@MAKERS
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"impl": "reference"}, {"dropout": 1e-12, "scale": 0.5}])
def test_output_and_gradients(make, rank, options):
    module, x = make(**options), torch.randn(7, 12, dtype=torch.float64)
    module.active_rank = rank
    y, grads = truth(module, x, rank)
    torch.testing.assert_close(module(x), y)
    module(x).square().sum().backward()
    halves = [half for pair in module.adapters() for half in pair]
    for half, grad in zip(halves, grads, strict=True):
        torch.testing.assert_close(half.grad, grad)
    for a, b in module.adapters():
        assert not a.grad[rank:].any()
        assert not b.grad[:, rank:].any()


def test_autograds_slicing_to_the_bit(monkeypatch):
    module, x = grouped(), torch.randn(7, 12, dtype=torch.float64)

    def steps():
        for rank in (2, 5, 1):
            module.active_rank = rank
            module(x).square().sum().backward()
        found = [half.grad for pair in module.adapters() for half in pair]
        module.zero_grad()
        return found

    mine = steps()
    monkeypatch.setattr(shared_parameters, "accumulates_slices", lambda owner: False)
    assert all(map(torch.equal, mine, steps()))


@MAKERS
def test_all_ranks_again(make):
    module, x = make(), torch.randn(7, 12, dtype=torch.float64)
    before = module(x)
    assert module.active_rank is None
    module.active_rank = 3
    assert module.active_rank == 3
    assert not torch.equal(module(x), before)
    module.active_rank = None
    assert torch.equal(module(x), before)
    module.active_rank = 5
    assert module.active_rank is None


@MAKERS
def test_merge(make):
    module, x = make().eval(), torch.randn(7, 12, dtype=torch.float64)
    module.active_rank = 2
    before = module(x)
    module.merge()
    torch.testing.assert_close(module(x), before)
    with pytest.raises(RuntimeError, match="active_rank: the adapters are merged"):
        module.active_rank = 1
    module.unmerge()
    assert torch.equal(module(x), before)


@MAKERS
def test_copies_keep_it_and_keys_stay(make):
    module, x = make(), torch.randn(7, 12, dtype=torch.float64)
    keys = {name: p.shape for name, p in module.state_dict().items()}
    module.active_rank = 2
    assert {name: p.shape for name, p in module.state_dict().items()} == keys
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.active_rank == 2
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "active_rank: rank must be a whole number from 1 on, got 0"),
        (-1, "got -1"),
        (2.0, "got 2.0"),
        (True, "got True"),
        (6, "active_rank must be at most the rank 5, got 6"),
    ],
)
def test_bad_ranks(rank, message):
    module = grouped()
    module.active_rank = 4
    with pytest.raises(ValueError, match=message):
        module.active_rank = rank
    assert module.active_rank == 4


@MAKERS
def test_compiles(make):
    torch._dynamo.reset()
    module, x = make(), torch.randn(7, 12, dtype=torch.float64)
    module.active_rank = 2
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_released_it_leaves_nothing():
    module = nn.Linear(12, 24)
    before = set(vars(module))
    FusedLoRALinear.adopt(module, rank=4).active_rank = 2
    assert set(vars(module.release())) == before
