"""loralib's state dicts, its layers written out as its ``layers.py`` computes them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_lora
from fused_lora import AdapterFileError


class Linear(nn.Linear):
    """loralib's Linear, not merged: y = x wT + (x aT bT) alpha / r."""

    def __init__(self, k, n, r, alpha):
        super().__init__(k, n)
        self.scaling = alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, k))
        self.lora_B = nn.Parameter(torch.randn(n, r))

    def forward(self, x):
        return super().forward(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class MergedLinear(nn.Linear):
    """loralib's MergedLinear: a grouped convolution of rank r over the parts that are enabled."""

    def __init__(self, k, n, r, alpha, enable_lora):
        super().__init__(k, n)
        self.scaling, self.enabled = alpha / r, enable_lora
        self.lora_A = nn.Parameter(torch.randn(r * sum(enable_lora), k))
        self.lora_B = nn.Parameter(torch.randn(n // len(enable_lora) * sum(enable_lora), r))

    def forward(self, x):
        delta = F.conv1d(
            self.lora_A.unsqueeze(0), self.lora_B.unsqueeze(-1), groups=sum(self.enabled)
        ).squeeze(0)
        parts = iter(delta.chunk(sum(self.enabled)))
        zero = torch.zeros(self.out_features // len(self.enabled), self.in_features)
        whole = torch.cat([next(parts) if on else zero for on in self.enabled])
        return super().forward(x) + (x @ whole.T) * self.scaling


def theirs(vit, make_qkv, alpha, r=4):
    """A ViT with loralib's layers on qkv and fc1."""
    torch.manual_seed(5)
    model = vit()
    for block in model.blocks:
        for holder, name, make in ((block.attn, "qkv", make_qkv), (block.mlp, "fc1", Linear)):
            plain = getattr(holder, name)
            made = make(plain.in_features, plain.out_features, r, alpha)
            made.load_state_dict(plain.state_dict(), strict=False)
            nn.init.normal_(made.lora_B, std=0.05)
            setattr(holder, name, made)
    return model.eval()


MASKS = [m for m in ([i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)) if any(m)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("alpha", [1, 8])
def test_every_mask_of_a_merged_linear(vit, image, mask, alpha):
    enabled = [bool(on) for on in mask]
    plain = theirs(vit, lambda k, n, r, alpha: MergedLinear(k, n, r, alpha, enabled), alpha)
    model = vit()
    targets = [role for role, on in zip("qkv", enabled, strict=True) if on] + ["fc1"]
    fused_lora.patch(model, rank=4, alpha=alpha, targets=targets)
    state = fused_lora.from_loralib(model, plain.state_dict())
    assert not any(model.load_state_dict(state))
    torch.testing.assert_close(model(image), plain(image), rtol=1e-4, atol=1e-5)
    only = {k: v for k, v in plain.state_dict().items() if "lora_" in k}  # lora_state_dict's
    found = model.load_state_dict(fused_lora.from_loralib(model, only), strict=False)
    assert not found.unexpected_keys and not any("lora" in key for key in found.missing_keys)


def test_a_linear_needs_no_conversion(vit, image):
    plain = theirs(vit, Linear, 8)
    model = vit()
    fused_lora.patch(model, rank=4, alpha=8, targets=["q", "k", "v", "fc1"], qkv="joint")
    assert fused_lora.from_loralib(model, plain.state_dict()).keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(image), plain(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"targets": ["q", "k", "v"]}, {"rank_pattern": {"q": 2}}], ids=str
)
def test_what_does_not_fit_is_named(vit, options):
    plain = theirs(vit, lambda k, n, r, alpha: MergedLinear(k, n, r, alpha, [True, False, True]), 1)
    model = vit()
    fused_lora.patch(model, **{"rank": 4, "targets": ["q", "v"]} | options)
    with pytest.raises(AdapterFileError, match=r"blocks\.0\.attn\.qkv\.lora_A .* are not the adap"):
        fused_lora.from_loralib(model, plain.state_dict())
