"""What trains beside the adapters, as it was when the model was patched: what ``disable`` shows.

Each module that owns such a parameter keeps copies of it and of its buffers, out of its state dict,
so that copies and parts of the model have theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.nn import AdaptedLinear
from fused_lora.ops.operand import is_sharded
from fused_lora.patching.report import PatchError

KEPT = "_fused_lora_original"  # attribute of the owner: {name: tensor}


def keep(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Keep copies of these parameters wherever they are, and of the buffers beside them."""
    wanted = {id(parameter) for parameter in parameters}
    for owner in model.modules() if wanted else ():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                kept = owner.__dict__.setdefault(KEPT, _buffers_of(owner))
                kept[name] = parameter.detach().clone()


def _buffers_of(owner: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in owner._buffers.items() if b is not None}


def forget(model: nn.Module) -> None:
    """Drop them."""
    for module in model.modules():
        module.__dict__.pop(KEPT, None)


def check_kept(model: nn.Module, base: Tensor | None) -> None:
    """Raises PatchError where something trains of which no original is kept, or not this base's.

    Args:
        model: patched.
        base: a row of an adapted weight as it was then; None where it had no values.
    """
    adapters = {id(p) for m in _adapted(model) for p in m.lora_parameters()}
    for prefix, module in model.named_modules():
        kept = module.__dict__.get(KEPT, {})
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in adapters:
                continue
            where = f"{prefix}.{name}" if prefix else name
            if parameter.requires_grad and name not in kept:
                raise PatchError(f"{where} trains beside the adapters, and {_HOW}")
            if name in kept and name == "weight" and getattr(module, "merged", False):
                raise PatchError(f"{where} trains and is merged: unmerge the model first")
            if name in kept and (kept[name].is_meta or is_sharded(parameter)):
                raise PatchError(f"{where} was on meta at patch, or is in shards now, and {_HOW}")
    row = first_row(model)
    if base is not None and row is not None and not _alike(row, base) and _any_kept(model):
        raise PatchError(f"another base was loaded since patch, and {_HOW}")


_HOW = (
    "what it was before is not known: name it in patch(trainable=...) after loading the base, or "
    'call disable(model, trained="current"), which leaves off the adapters alone'
)


def first_row(model: nn.Module) -> Tensor | None:
    """A row of the first adapted weight, by which another base is told; None where it has none."""
    first: Any = next(iter(_adapted(model)), None)
    if first is None:
        return None
    w = first._frozen().detach()
    return (
        None
        if w.is_meta or is_sharded(w) or w.dim() != 2
        else w[0].to("cpu", torch.float32, copy=True)
    )


def _alike(row: Tensor, then: Tensor) -> bool:
    """But for a move to another dtype."""
    return row.shape == then.shape and torch.allclose(row, then, rtol=2e-2, atol=1e-6)


def _any_kept(model: nn.Module) -> bool:
    return any(KEPT in module.__dict__ for module in model.modules())


def _adapted(model: nn.Module) -> Iterator[AdaptedLinear]:
    return (m for m in model.modules() if isinstance(m, AdaptedLinear))


@contextmanager
def shown(model: nn.Module) -> Iterator[None]:
    """Within, the originals stand in the places of what was trained, and take no gradient."""
    now: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = module._parameters, module._buffers
            for name, original in module.__dict__.get(KEPT, {}).items():
                for table in tables:
                    if (trained := table.get(name)) is not None:
                        now.append((table, name, trained))
                        table[name] = _in_its_place(original, trained)
        yield
    finally:
        for table, name, trained in now:
            table[name] = trained


def _in_its_place(original: Tensor, trained: Tensor) -> Tensor:
    moved = original.to(trained.device, trained.dtype)
    parameter = isinstance(trained, nn.Parameter)
    return nn.Parameter(moved, requires_grad=False) if parameter else moved
