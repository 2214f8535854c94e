"""Activations as stages: g = act(u), and gated, g = act(u_gate) u_value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops.chain.stage import Asked, Optional, Run, Stage, Tensors

Forward = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]  # of the gradient and of what went in


def _sigmoid_backward(dg: Tensor, u: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(dg, u.sigmoid())


def _gelu(approximate: str) -> tuple[Forward, Backward]:
    gelu = partial(F.gelu, approximate=approximate)
    return gelu, partial(torch.ops.aten.gelu_backward, approximate=approximate)


ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "sigmoid": (torch.sigmoid, _sigmoid_backward),
}


@dataclass(frozen=True)
class Activation(Stage):
    """g [M, N] = act(u [M, N])."""

    name: str  # a key of ACTIVATIONS

    def forward(self, x: Tensors, own: Optional, asked: Asked) -> Run:
        """g of u."""
        return Run((ACTIVATIONS[self.name][0](x[0]),))

    def backward(
        self, dy: Tensors, x: Tensors | None, run: Run, own: Optional, asked: Asked
    ) -> tuple[Tensors | None, Optional]:
        """du = act'(u) dg."""
        assert x is not None
        return (ACTIVATIONS[self.name][1](dy[0], x[0]),), ()

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        return (ACTIVATIONS[self.name][0](x[0]),)


@dataclass(frozen=True)
class Gated(Stage):
    """g [M, N] = act(gate) value, of two tensors [M, N] or of one [M, 2 N] that holds both."""

    name: str  # a key of ACTIVATIONS
    gate_last: bool = False  # which half of the one tensor is the gate

    def _halves(self, x: Tensors) -> tuple[Tensor, Tensor]:
        """(gate, value)."""
        first, second = x if len(x) == 2 else x[0].chunk(2, dim=-1)
        return (second, first) if self.gate_last else (first, second)

    def forward(self, x: Tensors, own: Optional, asked: Asked) -> Run:
        """g of gate and value."""
        gate, value = self._halves(x)
        return Run((ACTIVATIONS[self.name][0](gate).mul_(value),))

    def backward(
        self, dy: Tensors, x: Tensors | None, run: Run, own: Optional, asked: Asked
    ) -> tuple[Tensors | None, Optional]:
        """dgate = act'(gate) value dg and dvalue = act(gate) dg, laid out as x is."""
        assert x is not None
        gate, value = self._halves(x)
        du = tuple(torch.empty_like(part) for part in x)
        dgate, dvalue = self._halves(du)
        act, act_backward = ACTIVATIONS[self.name]
        torch.mul(act(gate), dy[0], out=dvalue)
        dgate.copy_(act_backward(dy[0] * value, gate))
        return du, ()

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        gate, value = self._halves(x)
        return (ACTIVATIONS[self.name][0](gate) * value,)
