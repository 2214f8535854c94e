"""A weight that others read: w' with its gradients, the frozen parameter where it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_lora.nn import FusedLoRAParameter, FusedLoRAWeight
from fused_lora.nn.weight_adapter import adapted_weight
from fused_lora.testing.yardstick import in_every_order, judge
from fused_lora.types import Span

SPANS = {"q": (0, 5), "v": (10, 15)}
RANKS = {"q": 2, "v": 3}


def linear(**options):
    """A linear of which q and v columns are adapted, b away from zero."""
    torch.manual_seed(0)
    made = FusedLoRAWeight.adopt(nn.Linear(7, 15), SPANS, RANKS, scale=0.5, **options)
    [nn.init.normal_(b) for _, b in made.adapters()]
    return made


def attention(**options):
    """torch's attention with q and v adapted."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(5, 1, batch_first=True)
    spans = {"q": (0, 5), "v": (10, 15)}
    child = FusedLoRAParameter.attach(made, "in_proj_weight", spans, RANKS, scale=0.5, **options)
    [nn.init.normal_(b) for _, b in child.adapters()]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_rounded_once(dtype):
    torch.manual_seed(0)
    w, a, b = torch.randn(15, 7).to(dtype), torch.randn(2, 7), torch.randn(5, 2)
    spans = [Span(3, 8, 2)]
    ours = adapted_weight(w, [a], [b], [0.3], spans)
    truth = adapted_weight(w.double(), [a.double()], [b.double()], [0.3], spans)
    term = lambda: 0.3 * b.to(dtype) @ a.to(dtype)  # noqa: E731
    plain = [torch.cat((w[:3], w[3:8] + each, w[8:])) for each in in_every_order(term)]
    assert ours.dtype is dtype
    assert torch.equal(ours[:3], w[:3]) and torch.equal(ours[8:], w[8:])
    verdict = judge("w'", ours, plain, truth, dtype)
    assert verdict.passed, str(verdict)


def test_gradcheck():
    torch.manual_seed(0)
    wide = {"dtype": torch.float64, "requires_grad": True}
    w, a, b = (torch.randn(s, **wide) for s in ((6, 3), (2, 3), (4, 2)))
    assert torch.autograd.gradcheck(
        lambda w, a, b: adapted_weight(w, [a], [b], [0.5], [Span(1, 5, 2)]), (w, a, b)
    )


def test_called_or_read_is_the_same():
    made, x = linear(), torch.randn(3, 7)
    torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias))
    grads = [
        torch.autograd.grad(y.square().sum(), list(made.parameters())[2:])
        for y in (made(x), F.linear(x, made.weight, made.bias))
    ]
    for called, read in zip(*grads, strict=True):
        torch.testing.assert_close(called, read)


def test_under_autocast_the_weight_stays_wide():
    made = linear()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.weight, linear().weight)


@pytest.mark.parametrize("make", [linear, attention])
def test_keys_are_the_vanilla_ones_and_the_adapters(make):
    made = make()
    vanilla = nn.Linear(7, 15) if make is linear else nn.MultiheadAttention(5, 1)
    keys = {key for key in made.state_dict() if "lora_" not in key}
    assert keys == vanilla.state_dict().keys()
    made.load_state_dict(vanilla.state_dict(), strict=True)
    assert not any("parametrizations" in name for name, _ in made.named_parameters())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [linear, attention])
def test_deepcopy_and_pickle(make, twin):
    made = make()
    other = twin(made)
    name = "weight" if make is linear else "in_proj_weight"
    assert type(other) is type(made)
    assert torch.equal(getattr(other, name), getattr(made, name))
    adapters = [p for n, p in other.named_parameters() if "lora_B" in n]
    [nn.init.zeros_(b) for b in adapters]
    assert not torch.equal(getattr(other, name), getattr(made, name))


def test_merge_unmerge_and_release_of_a_bare_parameter():
    made = attention().eval()
    base, merged = made._parameters["in_proj_weight"], made.in_proj_weight.detach()
    bits = base.detach().clone()
    made.in_proj.merge()
    torch.testing.assert_close(made.in_proj_weight, merged)
    with pytest.raises(RuntimeError, match=r"state_dict: in_proj is merged"):
        made.state_dict()
    made.in_proj.unmerge()
    assert torch.equal(made.state_dict()["in_proj_weight"], bits)
    assert made._parameters["in_proj_weight"] is base and torch.equal(base, bits)
    made.in_proj.release()
    assert type(made) is nn.MultiheadAttention and "in_proj" not in made._modules
    assert made.in_proj_weight is base


def test_disabled_reads_the_frozen_weight():
    made = linear()
    made.adapter_enabled = False
    assert made.weight is made._parameters["weight"]
    made.merge()
    assert made.weight is made._base[0]


def test_reading_a_merged_weight_in_training_fails():
    made = linear()
    made.merge()
    with pytest.raises(RuntimeError, match="would receive no gradient"):
        made.weight  # noqa: B018
    assert made.eval().weight is made.base


@pytest.mark.parametrize("make", [linear, attention])
def test_dropout_is_refused(make):
    with pytest.raises(ValueError, match=r"dropout 0.1 drops from x"):
        make(dropout=0.1)


def test_what_cannot_be_adopted_is_left_as_it_was():
    with pytest.raises(TypeError, match="a Conv2d cannot be adopted"):
        FusedLoRAWeight.adopt(nn.Conv2d(1, 1, 1), SPANS, RANKS)
    plain = nn.Linear(7, 15)
    with pytest.raises(ValueError, match=r"leaves the 15 columns"):
        FusedLoRAWeight.adopt(plain, {"q": (0, 16)}, {"q": 2})
    assert type(plain) is nn.Linear and list(plain.state_dict()) == ["weight", "bias"]
    assert "_groups" not in plain.__dict__


def test_a_compiled_read_follows_the_adapters():
    torch._dynamo.reset()
    made, x = linear().eval(), torch.randn(3, 7)
    compiled = torch.compile(
        lambda x: F.linear(x, made.weight), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), F.linear(x, made.weight))
    [nn.init.normal_(b) for _, b in made.adapters()]
    torch.testing.assert_close(compiled(x), F.linear(x, made.weight))
