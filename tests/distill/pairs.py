"""A teacher with adapters that do something, and a smaller student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.nn.shared_parameters import _passes
from tests.patching.models import build, wake


def teacher(rank=4, dtype=torch.float64, options=None, separate=False, **model) -> nn.Module:
    """Four blocks of width 48; ``separate`` takes their q, k and v apart."""
    made = build(**{"depth": 4} | model)
    for block in made.blocks if separate else ():
        block.attn = Separate(block.attn)
    made = made.to(dtype)
    fused_lora.patch(made, rank=rank, adapter_dtype=dtype, **options or {})
    return wake(made)


def student(dtype=torch.float64, **model) -> nn.Module:
    """Two blocks of width 32, two heads."""
    return build(**{"embed_dim": 32, "num_heads": 2} | model).to(dtype)


def images(count=2, dtype=torch.float64) -> Tensor:
    """Random images of the models' size."""
    return torch.randn(count, 3, 32, 32, dtype=dtype)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of what trains, taken out."""
    found = {name: p.grad for name, p in adapters(model).items()}
    model.zero_grad(set_to_none=True)
    assert not _passes, "a backward pass left something behind"
    return found


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether every gradient is there and equal, bit for bit."""
    assert mine.keys() == theirs.keys()
    assert all(value is not None for value in (*mine.values(), *theirs.values()))
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


class Separate(nn.Module):
    """A timm attention with q, k and v apart."""

    def __init__(self, fused):
        super().__init__()
        dim, self.heads, self.proj = fused.proj.in_features, fused.num_heads, fused.proj
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x, **_):
        heads = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = map(heads, (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))
