"""Activations as stages: g = act(u), and gated, g = act(u_gate) u_value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.interface import Adapters
from fused_lora.ops import gelu, row_shrink
from fused_lora.ops.chain.stage import (
    FREE,
    PLAIN,
    Asked,
    GradEpilogue,
    Optional,
    Place,
    Stage,
    StageRun,
    Tensors,
)

Forward = Callable[[Tensor, Tensor | None], Tensor]  # of what goes in, and where to write
Backward = Callable[[Tensor, Tensor], Tensor]  # of the gradient and of what went in


def _gelu(kind: str) -> tuple[Forward, Backward]:
    return (
        lambda u, out: gelu.gelu_forward(u, kind, out),
        lambda dg, u: gelu.gelu_input_grad(dg, u, kind),
    )


def _silu(u: Tensor, out: Tensor | None) -> Tensor:
    return F.silu(u) if out is None else torch.ops.aten.silu(u, out=out)


def _sigmoid_backward(dg: Tensor, u: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(dg, u.sigmoid())


KINDS = {"gelu": "erf", "gelu_tanh": "tanh"}
ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    **{name: _gelu(kind) for name, kind in KINDS.items()},
    "silu": (_silu, torch.ops.aten.silu_backward),
    "sigmoid": (lambda u, out: torch.sigmoid(u, out=out), _sigmoid_backward),
}
COMPOSED: dict[str, Callable[[Tensor], Tensor]] = {  # what autograd and the compiler know
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Activation(Stage):
    """g [M, N] = act(u [M, N])."""

    name: str  # a key of ACTIVATIONS

    leaves = False

    def forward(self, x: Tensors, own: Optional, asked: Asked, place: Place = FREE) -> StageRun:
        """g of u."""
        if place.makes and place.makes.adapters:
            assert self.gelu is not None
            out = torch.empty_like(x[0]) if place.out is None else place.out
            given = (x[0], self.gelu, place.makes.adapters, out, place.makes.right)
            made = row_shrink.gelu_shrink(*given)
            return StageRun((made.x,), h=made.h)
        return StageRun((ACTIVATIONS[self.name][0](x[0], place.out),))

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: Asked,
        epilogue: GradEpilogue = PLAIN,
    ) -> tuple[Tensors | None, Optional]:
        """du = act'(u) dg."""
        assert x is not None
        return (ACTIVATIONS[self.name][1](dy[0], x[0]),), ()

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        return (COMPOSED[self.name](x[0]),)

    def places(self, x: Tensors) -> bool:
        """As the kernel does; silu's and sigmoid's do."""
        return self.gelu is None or gelu.gelu_places(x[0], self.gelu)

    def shrinks(self, x: Tensors, own: Optional, adapters: Adapters) -> bool:
        """As GELU's kernel does."""
        asked = ("shrink_gelu", x[0], x[0].dtype, adapters.rank)
        return self.gelu is not None and row_shrink.why_not_shrink(*asked) is None

    @property
    def gelu(self) -> str | None:  # type: ignore[override]
        """Which form of it."""
        return KINDS.get(self.name)


@dataclass(frozen=True)
class Gated(Stage):
    """g [M, N] = act(gate) value, of two tensors [M, N] or of one [M, 2 N] that holds both."""

    name: str  # a key of ACTIVATIONS
    gate_last: bool = False  # which half of the one tensor is the gate

    def _halves(self, x: Tensors) -> tuple[Tensor, Tensor]:
        """(gate, value)."""
        first, second = x if len(x) == 2 else x[0].chunk(2, dim=-1)
        return (second, first) if self.gate_last else (first, second)

    def forward(self, x: Tensors, own: Optional, asked: Asked, place: Place = FREE) -> StageRun:
        """g of gate and value."""
        gate, value = self._halves(x)
        act, out = ACTIVATIONS[self.name][0](gate, None), place.out
        return StageRun((act.mul_(value) if out is None else torch.mul(act, value, out=out),))

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: Asked,
        epilogue: GradEpilogue = PLAIN,
    ) -> tuple[Tensors | None, Optional]:
        """dgate = act'(gate) value dg and dvalue = act(gate) dg, laid out as x is."""
        assert x is not None
        gate, value = self._halves(x)
        du = tuple(torch.empty_like(part) for part in x)
        dgate, dvalue = self._halves(du)
        act, act_backward = ACTIVATIONS[self.name]
        torch.mul(act(gate, None), dy[0], out=dvalue)
        dgate.copy_(act_backward(dy[0] * value, gate))
        return du, ()

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        gate, value = self._halves(x)
        return (COMPOSED[self.name](gate) * value,)

    def places(self, x: Tensors) -> bool:
        """The product does."""
        return True
