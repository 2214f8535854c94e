"""A base in FP8: codes follow the weight, the weight stays what it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_lora.nn import FusedLoRAGroupedLinear, FusedLoRALinear, FusedLoRAWeight, adopt_additive
from fused_lora.nn.block_modules import why_not_linear
from fused_lora.nn.grouped_projections import why_not_grouped
from fused_lora.nn.linear_state import weight_error
from fused_lora.ops.lora_linear_fp8 import lora_linear_fp8
from fused_lora.reference.lora_linear_fp8 import quantise

SPANS = {"v": (12, 20), "q": (0, 8)}  # not in order, and with a gap


def module_of(grouped=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    linear = nn.Linear(12, 20, dtype=dtype).requires_grad_(False)
    options |= {"base_dtype": "fp8", "scale": 0.5}
    if grouped:
        module = FusedLoRAGroupedLinear.adopt(linear, SPANS, 3, **options)
    else:
        module = FusedLoRALinear.adopt(linear, 3, **options)
    for parameter in module.lora_parameters():
        nn.init.normal_(parameter)
    return module


def expected(module, x):
    """y by the operation, on codes made now."""
    a, b = module._operands()
    spans = tuple(module.groups.values())
    return lora_linear_fp8(x, quantise(module.weight), module.bias, a, b, module.scales, spans)


@pytest.mark.parametrize("options", [{}, {"mid": "full"}, {"mid": "diagonal"}], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_operation_serves(grouped, options):
    module, x = module_of(grouped, **options), torch.randn(2, 7, 12, requires_grad=True)
    y = module(x)
    assert torch.equal(y, expected(module, x))
    y.sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in module.lora_parameters())
    assert "base=fp8" in repr(module)


def load_other(module):
    state = module.state_dict()
    module.load_state_dict(state | {"weight": torch.randn(20, 12)})


def load_assigned(module):
    module.load_state_dict(module.state_dict() | {"weight": torch.randn(20, 12)}, assign=True)
    module.weight.requires_grad_(False)


def write_through_data(module):
    module.weight.data.normal_()
    module.refresh_base()


CHANGES = {
    "written in place": lambda m: m.weight.mul_(torch.randn(20, 12)),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(20, 12), False)),
    "loaded": load_other,
    "loaded by assignment": load_assigned,
    "through .data": write_through_data,
    "data swapped": lambda m: setattr(m.weight, "data", torch.randn(20, 12)),
    "drawn anew": lambda m: m.reset_parameters(),
    "double": lambda m: m.double(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "merged and back": lambda m: (m.merge(), m.unmerge()),
    "emptied": lambda m: (m.to_empty(device="cpu"), m.reset_parameters()),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_codes_follow_the_weight(change, compiled):
    if compiled and change in (CHANGES["written in place"], CHANGES["data swapped"]):
        pytest.skip("a graph sees no versions: refresh_base() is for the caller")
    torch._dynamo.reset()
    module, x = module_of(), torch.randn(7, 12)
    module(x)
    with torch.no_grad():
        change(module)
        x = x.to(module.weight.dtype)
        if compiled and change is CHANGES["another parameter"]:
            module.refresh_base()
        run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
        assert torch.equal(run(x), expected(module, x))


def test_codes_are_formed_once():
    module, x = module_of(), torch.randn(7, 12)
    formed = module._codes._formed
    module(x)
    module.lora_A.data.normal_()
    module(x)
    assert module._codes._formed is formed
    assert formed.codes.codes.nbytes + formed.codes.scales.nbytes == 20 * (12 + 4)


def test_a_state_dict_is_the_plain_one():
    plain = FusedLoRALinear(12, 20, rank=3)
    module = module_of()
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in module.named_buffers()] == [n for n, _ in plain.named_buffers()]
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain.weight, module.weight)


def test_merged_and_disabled_are_exact():
    module, x = module_of(), torch.randn(7, 12)
    w, bits = module.weight, module.weight.clone()
    plain = nn.functional.linear(x, w, module.bias)
    module.adapter_enabled = False
    assert torch.equal(module(x), plain)
    module.adapter_enabled = True
    a, b = module.adapter()
    module.eval().merge()
    torch.testing.assert_close(module.weight.detach(), (bits + 0.5 * b @ a).detach())
    assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))
    module.unmerge()
    assert module.weight is w and torch.equal(w, bits)
    linear = module.release()
    assert linear.weight is w and torch.equal(linear(x), plain) and "_codes" not in vars(linear)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_form_their_own(copied):
    module, x = module_of(), torch.randn(7, 12)
    other = copied(module)
    assert other._codes is not module._codes
    assert torch.equal(other(x), module(x))


def test_a_base_that_the_init_changed():
    module, x = module_of(init="pissa"), torch.randn(7, 12)
    assert torch.equal(module(x), expected(module, x))


def test_it_stays_out_of_what_fuses_over_linears():
    assert why_not_grouped(module_of()) == "has its base in fp8"
    assert why_not_linear(module_of()) == "a base in fp8"


def test_meta():
    with torch.device("meta"):
        module = FusedLoRALinear(12, 20, rank=3, base_dtype="fp8").requires_grad_(False)
    assert module(torch.empty(7, 12, device="meta")).shape == (7, 20)


def test_the_error_is_that_of_e4m3():
    module = module_of()
    w = module.weight
    back = quantise(w).widened(torch.float64)
    error = float((back - w.double()).norm() / w.double().norm())
    assert abs(weight_error(w) - error) < 1e-6 and 0.01 < error < 2**-4
    assert weight_error(torch.zeros(3, 5)) == 0


def test_a_weight_that_trains_is_refused():
    module = FusedLoRALinear(12, 20, rank=3, base_dtype="fp8")
    with pytest.raises(RuntimeError, match="this one has requires_grad"):
        module(torch.randn(7, 12))
    with torch.no_grad():
        assert module(torch.randn(7, 12)).shape == (7, 20)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"base_dtype": "int8"}, r"None or one of \('fp8',\), got 'int8'"),
        ({"base_dtype": "fp8", "dora": True}, "not served with dora=True"),
        ({"base_dtype": "fp8", "dropout": 0.1}, "not served with dropout=0.1"),
    ],
)
def test_options_that_do_not_go_together(options, why):
    with pytest.raises(ValueError, match=why):
        FusedLoRALinear(12, 20, rank=3, **options)


def test_what_reads_or_hides_its_weight_is_refused():
    class Own(nn.Linear):
        pass

    with pytest.raises(ValueError, match="base_dtype='fp8' quantises the base weight, which Own"):
        adopt_additive(Own(12, 20), 3, base_dtype="fp8")
    with pytest.raises(ValueError, match="a weight that is read has none"):
        FusedLoRAWeight.adopt(nn.Linear(12, 20), {"": (0, 20)}, {"": 3}, base_dtype="fp8")
