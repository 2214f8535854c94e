"""What a module's adapters are in PEFT's words: w + s b a on the base it came with.

    mid           b mid for b                     only where the caller says so: mid itself is lost
    pissa, olora  a' = [a; a0]  b' = [b, -b0]     on w, which PEFT has, for a and b on w - s b0 a0
    dora          |w| for the rows that no adapter owns, so that their factor is 1

a0 and b0 are drawn again from the original weight, and held against the base that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.io.errors import AdapterFileError
from fused_lora.io.fuse import Group, groups_of
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.config import CHANGES_BASE
from fused_lora.nn.inits import draw
from fused_lora.nn.variants import folded, key_of
from fused_lora.ops.sharded import gathered, is_sharded

Pair = tuple[Tensor, Tensor]  # a [R, K], b [columns, R]


class Written(NamedTuple):
    """One module's adapters as a file holds them."""

    groups: tuple[Group, ...]
    pairs: dict[str, Pair]  # by group
    magnitude: Tensor | None = None  # [N]


def written(module: AdaptedLinear, where: str, fold_mid: bool = True) -> Written:
    """The module's adapters; raises AdapterFileError where w + s b a is not what it computes."""
    config = module.config
    if config.mid and not fold_mid:
        raise AdapterFileError(
            f"{where} carries mid={config.mid!r}, for which PEFT's format has no place: save with "
            "fold_mid=True, which writes b mid for b (and cannot be taken apart again), or keep "
            "model.state_dict()"
        )
    pairs: dict[str, Pair] = {}
    for name in module.groups:
        a, b = (gathered(half.detach()) for half in module.adapter(name))
        if config.mid:
            b = folded(b, gathered(getattr(module, key_of("lora_mid", name)).detach()))
        pairs[name] = a, b
    groups = groups_of(module)
    if config.init in CHANGES_BASE:
        groups, pairs = _on_the_original(module, groups, pairs, where)
    return Written(groups, pairs, _magnitude(module) if config.dora else None)


def _on_the_original(
    module: AdaptedLinear, groups: Sequence[Group], pairs: dict[str, Pair], where: str
) -> tuple[tuple[Group, ...], dict[str, Pair]]:
    (origin,) = module._origin
    base = module._base[0] if module.merged else module.base
    if is_sharded(base) or not all(group.scale for group in groups):
        raise AdapterFileError(
            f"{where} was started by init={module.config.init!r}: what it took from the weight can "
            "be written neither of a sharded model nor with a scale of 0"
        )
    doubled, wide = {}, []
    for group in groups:
        a, b = pairs[group.name]
        a0, b0 = torch.empty_like(a), torch.empty_like(b)
        rows = slice(group.span.start, group.span.stop)
        draw(module.config.init, origin[rows], a0, b0, group.scale, None)
        _check_base(
            module, origin[rows], base[rows], group.scale * b0.double() @ a0.double(), where
        )
        doubled[group.name] = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
        wide.append(replace(group, span=replace(group.span, rank=2 * group.span.rank)))
    return tuple(wide), doubled


def _check_base(
    module: AdaptedLinear, origin: Tensor, base: Tensor, taken: Tensor, where: str
) -> None:
    """The base must be the original less what the init took, but for its rounding."""
    wanted, found = origin.detach().double(), base.detach().double() + taken.detach()
    off = (wanted - found).norm() / wanted.norm()
    limit = 16 * torch.finfo(origin.dtype).eps
    if not off <= limit:
        raise AdapterFileError(
            f"{where} was started by init={module.config.init!r}, but its base is not what that "
            f"left of the weight (off by {float(off):.1e} of it, {limit:.1e} allowed), as where "
            "another base was loaded into it: keep model.state_dict()"
        )


def _magnitude(module: AdaptedLinear) -> Tensor:
    whole = rest_of(module)
    for name, span in module.groups.items():
        own = gathered(getattr(module, key_of("lora_magnitude", name)).detach())
        whole[span.start : span.stop] = own
    return whole


def rest_of(module: AdaptedLinear) -> Tensor:
    """|w| of each row [N], the magnitude of those that no adapter owns."""
    first = next(iter(module.groups))
    own = getattr(module, key_of("lora_magnitude", first))
    w = gathered(module._frozen().detach())
    return torch.linalg.vector_norm(w, dim=1, dtype=torch.promote_types(w.dtype, own.dtype)).to(
        own.dtype
    )


def uncovered(module: AdaptedLinear) -> Tensor:
    """Whether each row [N] belongs to no adapter."""
    free = torch.ones(module.out_features, dtype=torch.bool)
    for span in module.groups.values():
        free[span.start : span.stop] = False
    return free


def why_not_into(module: AdaptedLinear) -> str | None:
    """Why a file's w + s b a cannot become this module's; None where it can."""
    config = module.config
    if config.mid:
        return (
            f"carries mid={config.mid!r}, which no file holds apart from b: patch without mid to "
            "load what fold_mid=True wrote"
        )
    if config.init in CHANGES_BASE:
        ranks = sorted({2 * span.rank for span in module.groups.values()})
        return (
            f"was started by init={config.init!r}, on a base of its own: patch the plain model "
            f"with rank {ranks} and no such init to load what save wrote, on the original base"
        )
    return None
