"""merge, unmerge and disable, for a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from fused_lora.nn.stand_in import offloaded
from fused_lora.patching.errors import PatchError
from fused_lora.patching.originals import check_kept, shown
from fused_lora.patching.patch import RECORD, adapted, check_mergeable, merge_all

TRAINED = ("original", "current")  # what ``disable`` shows of what trains beside the adapters


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
def disable(model: nn.Module, trained: str = "original") -> Iterator[None]:
    """Within the ``with`` block the model computes what it did before ``patch``.

    Args:
        model: a patched model, or a part of one.
        trained: what stands for the parameters that train beside the adapters (``trainable=``, a
            LoraConfig's ``modules_to_save``): "original", as ``patch`` found them, or "current",
            as they are now, so that the adapters alone are left off.

    Raises:
        PatchError: something trains of which no original is known, as where it was named after
            ``patch``, or another base was loaded since.
    """
    if trained not in TRAINED:
        raise PatchError(f"trained must be one of {TRAINED}, got {trained!r}")
    modules = [module for _, module in adapted(model)]
    original = trained == TRAINED[0]
    for report in (m.__dict__[RECORD] for m in model.modules() if RECORD in m.__dict__):
        if original:
            check_kept(model, report.base_row)
    before = [module.adapter_enabled for module in modules]
    with shown(model) if original else nullcontext():
        for module in modules:
            module.adapter_enabled = False
        try:
            yield
        finally:
            for module, enabled in zip(modules, before, strict=True):
                module.adapter_enabled = enabled
