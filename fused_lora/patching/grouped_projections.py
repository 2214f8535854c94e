"""Several linears of one x as one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fused_lora.nn.block_modules import FusedModule
from fused_lora.nn.grouped_projections import FusedLoRAGroupedProjections, why_not_grouped
from fused_lora.nn.stand_in import bound_forward, device_hook
from fused_lora.patching.observe import ObservedWeight
from fused_lora.patching.report import ShareRow
from fused_lora.patching.targets import Target
from fused_lora.types import Role

KINDS = (frozenset({Role.Q, Role.K, Role.V}), frozenset({Role.FC1}))  # what stands side by side
HOLDERS = (nn.ModuleList, nn.ModuleDict)  # have no forward


def gather(
    model: nn.Module, targets: Sequence[Target], observations: Mapping[str, ObservedWeight]
) -> list[ShareRow]:
    """Let those of one module that are given the same tensor share it; a row for each module."""
    families = _families(targets)
    rows: list[ShareRow] = []
    groups: dict[str, list[list[str]]] = {}
    for parent, names in families.items():
        reason = _why_apart(model, parent, names)
        together = [] if reason else _same_x(names, observations)
        if together:
            groups.setdefault(parent, []).extend(together)
        if not together and not reason:
            reason = f"{_short(parent, names[-1])} is given another tensor"
        rows.append(ShareRow(parent, tuple(_short(parent, n) for n in _flat(together)), reason))
    for parent, together in groups.items():
        paths = [[_short(parent, name) for name in names] for names in together]
        FusedLoRAGroupedProjections.gather(model.get_submodule(parent), paths)
    return rows


def _families(targets: Sequence[Target]) -> dict[str, list[str]]:
    """Names of several called projections of one kind, by the module that holds them nearest."""
    found: dict[tuple[str, frozenset[Role]], list[str]] = {}
    for target in targets:
        roles = set(target.found.roles)
        kind = next((kind for kind in KINDS if roles and roles <= kind), None)
        if kind and target.found.tensor == "weight" and not target.read:
            parent = target.found.name.removesuffix(".linear").rpartition(".")[0]
            found.setdefault((parent, kind), []).append(target.found.name)
    return {parent: names for (parent, _), names in found.items() if len(names) > 1}


def _why_apart(model: nn.Module, parent: str, names: Sequence[str]) -> str:
    holder = model.get_submodule(parent)
    if isinstance(holder, FusedModule):
        return "fused over"
    if why := bound_forward(holder) or device_hook(holder):
        return why
    if isinstance(holder, HOLDERS):
        return f"a {type(holder).__name__} has no forward to share within"
    alone = ((name, why_not_grouped(model.get_submodule(name))) for name in names)
    return next((f"{_short(parent, name)} {why}" for name, why in alone if why), "")


def _same_x(names: Sequence[str], observations: Mapping[str, ObservedWeight]) -> list[list[str]]:
    """Groups of two or more that were called with one tensor."""
    by_x: dict[int, list[str]] = {}
    for name in names:
        if observations[name].given is not None:
            by_x.setdefault(id(observations[name].given), []).append(name)
    return [group for group in by_x.values() if len(group) > 1]


def _short(parent: str, name: str) -> str:
    return name.removeprefix(f"{parent}.") if parent else name


def _flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [name for group in groups for name in group]
