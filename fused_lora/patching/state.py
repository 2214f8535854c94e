"""merge, unmerge and disable, for a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fused_lora.nn.stand_in import offloaded
from fused_lora.patching.errors import PatchError
from fused_lora.patching.patch import adapted, check_mergeable, merge_all


def merge(model: nn.Module, rounding: str = "nearest", seed: int = 0, impl: str = "auto") -> None:
    """Fold every adapter into its weight: w' = w + s b a. The frozen weights are kept aside.

    Args:
        model: a patched model.
        rounding: "nearest", or "stochastic" for 16-bit weights, by ``seed``.
        seed: of the counter-based generator; each layer draws its own numbers.
        impl: as in ``fused_lora.ops.lora_merge``.

    Raises:
        PatchError: no adapters, or some already merged; nothing is changed.
    """
    modules = adapted(model)
    for name, module in modules:
        if module.merged:
            raise PatchError(f"{name} is already merged; unmerge the model first")
    check_mergeable(modules)
    merge_all((module for _, module in modules), rounding, seed, impl)


def unmerge(model: nn.Module) -> None:
    """Put every frozen weight back, the same bits; raises PatchError where one is not merged."""
    modules = adapted(model)
    for name, module in modules:
        if not module.merged:
            raise PatchError(f"{name} is not merged")
        if why := offloaded(module):
            raise PatchError(f"unmerge: {name}: {why}")
    for _, module in modules:
        module.unmerge()


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Within the ``with`` block the model computes its base, without adapters."""
    modules = [module for _, module in adapted(model)]
    before = [module.adapter_enabled for module in modules]
    for module in modules:
        module.adapter_enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.adapter_enabled = enabled
