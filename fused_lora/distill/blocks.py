"""The blocks of a vision transformer: their projections, part by part, and what they put out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fused_lora.arguments import brief
from fused_lora.distill.stack import tapped
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


class Tokens(NamedTuple):
    """The tokens that heads and comparisons read."""

    blocks: list[Tensor]  # [B, T, d] each, in the model's order
    prefix: int  # class and register tokens before the patches'
    size: tuple[int, int]  # of the image, in pixels

    @property
    def classes(self) -> list[Tensor]:
        """The class token of each block, [B, d]."""
        return [block[:, 0] for block in self.blocks]

    @property
    def patches(self) -> list[Tensor]:
        """The patch tokens of each block, [B, T - prefix, d]."""
        return [block[:, self.prefix :] for block in self.blocks]


def tokens_of(
    model: nn.Module, images: Tensor, last: int | None = None, *, norm: bool = True
) -> Tokens:
    """The outputs of the last blocks of one forward of ``model``.

    Args:
        model: a vision transformer; its class token comes first, and ``num_prefix_tokens`` (1
            where it has none) tokens come before the patches'.
        images: [B, channels, height, width].
        last: how many blocks; None for all.
        norm: pass each through the model's final ``norm``, where it has one.

    Raises:
        ValueError: ``last`` is not from 1 to the model's blocks, or a block's output is no
            [B, T, d].
    """
    names = _names(model)
    count = len(names) if last is None else last
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(names):
        raise ValueError(f"last must be a whole number from 1 to {len(names)}, got {brief(last)}")
    with tapped(model, names[-count:]) as found:
        getattr(model, "forward_features", model)(images)
    final = getattr(model, "norm", None) if norm else None
    outputs = [found[name] for name in names[-count:]]
    for name, output in zip(names[-count:], outputs, strict=True):
        if output.dim() != 3:
            raise ValueError(f"{name} puts out {tuple(output.shape)}, not tokens [B, T, d]")
    if isinstance(final, nn.Module):
        outputs = [final(output) for output in outputs]
    height, width = images.shape[-2:]
    return Tokens(outputs, int(getattr(model, "num_prefix_tokens", 1)), (height, width))


# Of a model with so many modules: to find its blocks takes longer than a small one's forward.
_known: WeakKeyDictionary[nn.Module, tuple[int, list[str]]] = WeakKeyDictionary()


def _names(model: nn.Module) -> list[str]:
    count = sum(1 for _ in model.modules())
    known = _known.get(model)
    if known is None or known[0] != count:
        known = _known[model] = count, [block.name for block in blocks_of(model)]
    return known[1]
