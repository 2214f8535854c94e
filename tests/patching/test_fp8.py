"""patch(base_dtype="fp8"): what the report says, what falls back to linears, the way back."""

from __future__ import annotations

import pytest
import timm
import torch

import fused_lora
from fused_lora.patching.report import PatchError
from fused_lora.testing.yardstick import error
from tests.patching.models import build, images, wake


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build()


def test_report_and_explain(model):
    report = fused_lora.patch(model, rank=4, base_dtype="fp8")
    assert all(0.01 < row.base_error < 2**-4 for row in report.rows)
    assert all("fp8/" in row.plan for row in report.rows)
    assert "base error" in str(report) and f"{report.rows[0].base_error:.2e}" in str(report)
    assert {row.reason for row in report.blocks} == {"attention: a base in fp8; MLP: a base in fp8"}
    said = fused_lora.explain(model)
    assert "chosen  fp8/" in said and "not     triton: " in said
    plain = build()
    assert "base error" not in str(fused_lora.patch(plain, rank=4))


def test_it_trains_and_is_near_the_frozen_model(model):
    x = images(model)
    before = model(x)
    fused_lora.patch(model, rank=4, base_dtype="fp8", trainable="^head")
    y = model(x)
    assert 0.001 < error(y.detach(), before.detach()) < 0.1
    wake(model)
    model(x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 + 2 * (6 + 2 + 2 + 2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_gradients_are_near_those_of_the_weight_itself(model):
    grads = {}
    for base_dtype in (None, "fp8"):
        fused_lora.patch(model, rank=4, base_dtype=base_dtype, seed=0)
        torch.manual_seed(1)
        wake(model)
        torch.manual_seed(2)
        model(images(model)).square().sum().backward()
        named = model.named_parameters()
        grads[base_dtype] = torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])
        fused_lora.unpatch(model)
        model.zero_grad()
    assert 0.001 < error(grads["fp8"], grads[None]) < 0.2


def test_the_way_back_is_exact(model):
    x, state = images(model), {k: v.clone() for k, v in model.state_dict().items()}
    weights, y = [p for _, p in model.named_parameters()], model(x)
    fused_lora.patch(model, rank=4, base_dtype="fp8")
    wake(model)
    with fused_lora.disable(model):
        assert torch.equal(model(x), y)
    fused_lora.merge(model)
    fused_lora.unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)
    fused_lora.unpatch(model)
    assert all(a is b for (_, a), b in zip(model.named_parameters(), weights, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_a_saved_adapter_is_the_same_file(model, tmp_path):
    fused_lora.patch(model, rank=4, base_dtype="fp8", seed=0)
    wake(model)
    fused_lora.save(model, tmp_path)
    other = build()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    fused_lora.patch(other, rank=4, base_dtype="fp8")
    fused_lora.load(other, tmp_path)
    x = images(model)
    assert torch.equal(other(x), model(x))


def test_a_model_that_reads_its_weights_is_refused():
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3)
    state = beit.state_dict().keys()
    with pytest.raises(PatchError, match="qkv: base_dtype='fp8' cannot be served"):
        fused_lora.patch(beit, rank=4, base_dtype="fp8")
    assert beit.state_dict().keys() == state


@pytest.mark.parametrize(
    "options, why",
    [
        ({"base_dtype": "fp4"}, "got 'fp4'"),
        ({"base_dtype": "fp8", "keep_forward": True}, "give one of them"),
        ({"base_dtype": "fp8", "memory_budget_gb": 1.0}, "a base in fp8"),
        ({"base_dtype": "fp8", "dora": True}, "not served with dora"),
    ],
)
def test_what_does_not_go_together(model, options, why):
    names = model.state_dict().keys()
    with pytest.raises(ValueError, match=why):
        fused_lora.patch(model, rank=4, **options)
    assert model.state_dict().keys() == names
