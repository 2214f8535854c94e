"""A small ViT, patched and moved off its initial values."""

import copy
import functools

import pytest
import torch

import fused_lora

timm = pytest.importorskip("timm")


@functools.cache
def _original():
    torch.manual_seed(0)
    # 32 pixels in patches of 16: 5 tokens; two blocks, so that they can differ; 3 heads of 16
    sizes = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def _vit():
    return copy.deepcopy(_original())


@pytest.fixture
def vit():
    """Makes a vanilla model, always the same."""
    return _vit


@pytest.fixture
def patched():
    """Makes a patched model; ``noise`` moves everything that trains."""

    def make(noise=0.1, rank=4, **options):
        model = _vit()
        fused_lora.patch(model, rank=rank, **options)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(noise * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def image():
    """x of the models above."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def snapshot():
    """Everything a load could change, as comparable values."""

    def take(model):
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        kind = fused_lora.nn.AdaptedLinear
        scales = {name: m.scales for name, m in model.named_modules() if isinstance(m, kind)}
        return state, scales

    return take


@pytest.fixture
def same(snapshot):
    """Whether a model is what the snapshot says, bit for bit."""

    def check(model, before):
        state, scales = snapshot(model)
        equal = all(torch.equal(tensor, before[0][key]) for key, tensor in state.items())
        return equal and set(state) == set(before[0]) and scales == before[1]

    return check
