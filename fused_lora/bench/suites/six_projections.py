"""The linear layers of one block alone: fused qkv, attention output, fc1 and fc2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_lora.bench.registry import suite
from fused_lora.bench.shapes import Shape
from fused_lora.bench.workload import Workload


class Projections(nn.Module):
    """Four linears side by side, each with an input of its own."""

    def __init__(self, width: int, expansion: int, **like: object) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, **like)
        self.proj = nn.Linear(width, width, **like)
        self.fc1 = nn.Linear(width, expansion * width, **like)
        self.fc2 = nn.Linear(expansion * width, width, **like)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Each linear of its own input."""
        layers = (self.qkv, self.proj, self.fc1, self.fc2)
        return tuple(layer(x) for layer, x in zip(layers, inputs, strict=True))


@suite("six_projections")
class SixProjections(Workload):
    """Forward and backward with a given dy; inputs ask for their gradient, as inside a network.

    Under autocast qkv and fc1 get fp32 inputs, as a LayerNorm hands them over, and the other two
    bf16 ones, as attention and GELU do.
    """

    def __init__(self, shape: Shape, batch: int, dtype: str, device: str) -> None:
        super().__init__(shape, batch, dtype, device)
        generator = torch.Generator().manual_seed(0)
        like = {"device": device, "dtype": self.stored}
        self.base = Projections(shape.width, shape.expansion, **like).requires_grad_(False)
        self.inputs = []
        for name, linear in self.base.named_children():
            x = torch.randn(batch, shape.tokens, linear.in_features, generator=generator)
            narrow = dtype == "amp" and name in ("proj", "fc2")
            self.inputs.append(x.to(device, torch.bfloat16 if narrow else self.stored))
            std = linear.in_features**-0.5
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * std)
        self._dy: dict[tuple, Tensor] = {}

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
