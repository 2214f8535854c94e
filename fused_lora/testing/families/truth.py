"""Naive LoRA on the roles that ``patch`` names, written without the library's layers.

The truth puts every adapter into its weight, so that it is at work whether the model calls the
module or reads the weight: w + s b a. The yardstick does what people do: y + s (x aT) bT behind a
module that is called, and the weight only where it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class Adapter:
    """One adapter as the model reports it."""

    holder: str  # dotted name of the module that owns the weight
    tensor: str  # "weight", or the name of a bare parameter
    columns: tuple[int, int]
    scale: float
    a: Tensor  # [R, K]
    b: Tensor  # [columns, R]
    read: bool


class InWeight(nn.Module):
    """w + s b a on some columns."""

    def __init__(self, adapter: Adapter, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.start, self.stop = adapter.columns
        self.scale, self.pair = adapter.scale, (a, b)

    def forward(self, w: Tensor) -> Tensor:
        """w' [N, K]."""
        a, b = self.pair
        return w + F.pad(self.scale * b @ a, (0, 0, self.start, w.shape[0] - self.stop))


def install(
    model: nn.Module, adapters: Iterable[Adapter], dtype: torch.dtype, by_weight: bool
) -> tuple[nn.Module, list[Tensor]]:
    """A copy of ``model`` in ``dtype`` with naive LoRA, and every a and b, in order."""
    model = copy.deepcopy(model).requires_grad_(False)
    model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # complex ones stay so
    leaves = []
    for each in adapters:
        a, b = (t.detach().to(dtype).clone().requires_grad_() for t in (each.a, each.b))
        leaves += [a, b]
        holder = model.get_submodule(each.holder)
        if by_weight or each.read:
            part = InWeight(each, a, b)
            parametrize.register_parametrization(holder, each.tensor, part, unsafe=True)
        else:
            holder.register_forward_hook(_behind(each, a, b))
    return model, leaves


def _behind(adapter: Adapter, a: Tensor, b: Tensor):  # type: ignore[no-untyped-def]
    start, stop = adapter.columns

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        h = F.linear(inputs[0], a)
        return y + F.pad(adapter.scale * F.linear(h, b), (start, y.shape[-1] - stop))

    return hook
