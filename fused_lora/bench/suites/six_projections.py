"""The linear layers of one block alone: fused qkv, attention output, fc1 and fc2."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fused_lora.bench.registry import suite
from fused_lora.bench.roofline import Linear
from fused_lora.bench.shapes import ModelShape
from fused_lora.bench.workload import Workload


class Projections(nn.Module):
    """Four linears side by side, each with an input of its own."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, expansion * width)
        self.fc2 = nn.Linear(expansion * width, width)

    def layers(self) -> dict[str, nn.Linear]:
        """The four, by name."""
        return {"qkv": self.qkv, "proj": self.proj, "fc1": self.fc1, "fc2": self.fc2}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Each linear of its own input."""
        return tuple(f(x) for f, x in zip(self.layers().values(), inputs, strict=True))


@suite("six_projections")
class SixProjections(Workload):
    """Forward and backward with a given dy; inputs ask for their gradient, as inside a network.

    Under autocast qkv and fc1 get fp32 inputs, as a LayerNorm hands them over, and the other two
    bf16 ones, as attention and GELU do.
    """

    def __init__(self, shape: ModelShape, batch: int, dtype: str, device: str) -> None:
        super().__init__(shape, batch, dtype, device)
        generator = torch.Generator().manual_seed(0)
        base = Projections(shape.width, shape.expansion).to(device, self.stored)
        self.base = base.requires_grad_(False)
        self.inputs = []
        for name, linear in base.layers().items():
            x = torch.randn(batch, shape.tokens, linear.in_features, generator=generator)
            narrow = dtype == "amp" and name in ("proj", "fc2")
            self.inputs.append(x.to(device, torch.bfloat16 if narrow else self.stored))
            std = linear.in_features**-0.5
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * std)
        self._dy: dict[tuple[int, ...], Tensor] = {}

    def linears(self, rank: int) -> list[Linear]:
        """The four, three adapters on the first."""
        m = self.batch * self.shape.tokens
        found = []
        for name, linear in cast(Projections, self.base).layers().items():
            adapters = 3 if name == "qkv" else 1
            k, n = linear.in_features, linear.out_features
            found.append(Linear(m, k, n, adapters * rank, adapters))
        return found

    def forward(self, model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The four outputs; last step's input gradients are dropped first."""
        for x in inputs:
            x.requires_grad_().grad = None
        return model(*inputs)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """The same random dy every step."""
        torch.autograd.backward(outputs, [self._gradient_of(y) for y in outputs])

    def _gradient_of(self, y: Tensor) -> Tensor:
        full = (self.batch, *y.shape[1:])
        if full not in self._dy:
            generator = torch.Generator().manual_seed(y.shape[-1])
            self._dy[full] = torch.randn(full, generator=generator).bfloat16().to(y.device)
        key = (*y.shape, y.dtype)
        if key not in self._dy:
            self._dy[key] = self._dy[full][: len(y)].to(y.dtype)
        return self._dy[key]
