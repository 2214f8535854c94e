"""One small patched ViT, its data, and a few steps of training: what every stack is held to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora.ops.operand import gathered
from tests.patching.models import build, wake


def patched(depth: int = 2, **options) -> nn.Module:
    """The same weights and adapters at every call, b away from zero."""
    torch.manual_seed(0)
    model = build(depth=depth)
    fused_lora.patch(model, rank=4, seed=0, trainable=["^head"], **options)
    return wake(model).train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 10


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch, so that halves of it average to the whole."""
    return F.cross_entropy(model(x), labels)


def gradients(model: nn.Module, count: int = 4) -> dict[str, Tensor]:
    """The gradient of every trained parameter, on one batch."""
    model.zero_grad()
    loss_of(model, *batch(count)).backward()
    return {name: p.grad.clone() for name, p in trained(model).items()}


def train(
    model: nn.Module,
    run: nn.Module | None = None,
    mine: slice = slice(None),
    steps: int = 3,
) -> dict[str, Tensor]:
    """The trained parameters after some steps of SGD on one batch, or on one process's part."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    x, labels = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model if run is None else run, x[mine], labels[mine]).backward()
        optimizer.step()
    return {name: gathered(p.detach()).clone() for name, p in trained(model).items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    """Raises AssertionError, naming the parameter, where the two differ."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m: f"{name}: {m}", **tolerance)  # noqa: B023
