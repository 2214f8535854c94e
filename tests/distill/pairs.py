"""A teacher with adapters that do something, and a smaller student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.nn.aside import _passes
from tests.patching.models import build, wake


def teacher(rank=4, dtype=torch.float64, options=None, **model) -> nn.Module:
    """Four blocks of width 48."""
    made = build(**{"depth": 4} | model).to(dtype)
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
