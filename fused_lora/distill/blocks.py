"""The projections of a vision transformer, block by block and part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fused_lora.patching.report import PatchError
from fused_lora.patching.rules import FoundProjection, find
from fused_lora.types import Role

MLP = {Role.FC1, Role.FC2}


@dataclass(frozen=True)
class Part:
    """The columns of one linear that do one thing: all of them, or a q|k|v third, or a GLU half."""

    name: str  # dotted, of the linear
    module: nn.Module
    key: str  # what it does, unique in its block: "q", "fc1", "fc1_2"
    start: int  # first column of y
    stop: int  # last column of y, exclusive


@dataclass(frozen=True)
class Block:
    """One transformer block: its dotted name and its parts by key, in the model's order."""

    name: str
    parts: dict[str, Part]


def blocks_of(model: nn.Module) -> list[Block]:
    """Every block, in order; raises PatchError where the model has none."""
    grouped: dict[str, list[FoundProjection]] = {}
    found = find(model)
    homes = {_home(each.name, found) for each in found if not MLP & set(each.roles)} - {None}
    for each in found:
        home = next((up for up in _ancestors(each.name) if up in homes), None)
        if home is not None:
            grouped.setdefault(home, []).append(each)
    if not grouped:
        raise PatchError(f"{type(model).__name__} has no transformer block that is known here")
    return [Block(name, _parts(projections)) for name, projections in grouped.items()]


def _home(attention: str, found: list[FoundProjection]) -> str | None:
    mlps = [each.name for each in found if MLP & set(each.roles)]
    ups = _ancestors(attention)
    return next((up for up in ups if any(m.startswith(up + "." * bool(up)) for m in mlps)), None)


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _parts(projections: list[FoundProjection]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for each in projections:
        if each.tensor != "weight":
            raise PatchError(f"{each.name} is a bare parameter, not a linear: it cannot be shared")
        roles = each.roles * _halves(each, projections)
        width = int(each.module.out_features) // len(roles)  # type: ignore[arg-type]
        for i, role in enumerate(roles):
            key = _free(role.value, parts)
            parts[key] = Part(each.name, each.module, key, i * width, (i + 1) * width)
    return parts


def _halves(each: FoundProjection, projections: list[FoundProjection]) -> int:
    """2 for the packed input of a gated MLP, twice as wide as its output layer takes."""
    parent = each.name.rpartition(".")[0]
    takes = {
        p.module.in_features
        for p in projections
        if p.roles == (Role.FC2,) and p.name.rpartition(".")[0] == parent
    }
    packed = each.roles == (Role.FC1,) and takes == {each.module.out_features // 2}  # type: ignore
    return 2 if packed else 1


def _free(key: str, taken: dict[str, Part]) -> str:
    others = sum(name == key or name.startswith(f"{key}_") for name in taken)
    return f"{key}_{others + 1}" if others else key
