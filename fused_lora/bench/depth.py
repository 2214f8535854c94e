"""The blocks of a network, and the same network with fewer of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def trunk(model: nn.Module) -> nn.Module | None:
    """The module that holds the blocks, however it is wrapped; None for a bare layer set."""
    return next((module for module in model.modules() if "blocks" in module._modules), None)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, first to last."""
    holder = trunk(model)
    return list(holder.get_submodule("blocks").children()) if holder else []


@contextmanager
def shallow(model: nn.Module, depth: int) -> Iterator[nn.Module]:
    """``model`` with its first ``depth`` blocks alone: the very modules, for the time being."""
    holder = trunk(model)
    if holder is None:
        yield model
        return
    whole = holder.get_submodule("blocks")
    holder.blocks = nn.Sequential(*list(whole.children())[:depth])
    try:
        yield model
    finally:
        holder.blocks = whole
