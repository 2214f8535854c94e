"""Which part of which adapter each linear of a student gets, decided before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fused_lora.distill.blocks import Block, Part
from fused_lora.nn import AdaptedLinear, AdapterConfig
from fused_lora.nn.adapted import check_adoptable, check_rank
from fused_lora.nn.shared_parameters import SharedAdapter
from fused_lora.patching.report import PatchError
from fused_lora.types import Span


@dataclass(frozen=True)
class Deal:
    """One linear of the student: its loans by group, and how its adapters compute."""

    name: str  # dotted
    linear: nn.Linear
    keys: tuple[str, ...]  # the parts that share: "q", "v"
    loans: dict[str, SharedAdapter]
    config: AdapterConfig


def deals(pairs: Iterable[tuple[Block, Block]], rank: int | None) -> list[Deal]:
    """The deals of all (student block, teacher block); raises PatchError where one cannot be."""
    found: dict[nn.Module, Deal] = {}
    for mine, theirs in pairs:
        offered = _offered(theirs)
        _check_keys(mine, theirs, offered)
        by_linear: dict[str, list[Part]] = {}
        for part in mine.parts.values():
            by_linear.setdefault(part.name, []).append(part)
        for name, parts in by_linear.items():
            if any(part.key in offered for part in parts):
                found.setdefault(parts[0].module, _deal(name, parts, offered, rank))
    if not found:
        raise PatchError("none of the teacher's blocks that the mapping names carries adapters")
    return list(found.values())


def _offered(block: Block) -> dict[str, tuple[Part, SharedAdapter]]:
    """The parts of a teacher's block that carry an adapter, each as a loan of the whole of it."""
    offered = {}
    for key, part in block.parts.items():
        groups = part.module.groups if isinstance(part.module, AdaptedLinear) else {}
        for group, span in groups.items():
            if span.start <= part.start and part.stop <= span.stop:
                whole = Span(part.start, part.stop, span.rank)
                assert isinstance(part.module, AdaptedLinear)
                offered[key] = (
                    part,
                    SharedAdapter(part.module, group, part.start - span.start, whole),
                )
            elif span.start < part.stop and part.start < span.stop:
                raise PatchError(
                    f"the teacher's {part.name}: the adapter {group!r} acts on columns "
                    f"{span.start} to {span.stop}, which is a piece of {key}'s {part.start} to "
                    f"{part.stop}"
                )
    return offered


def _check_keys(mine: Block, theirs: Block, offered: dict[str, tuple[Part, SharedAdapter]]) -> None:
    roles = {key.partition("_")[0] for key in offered}
    wanted = {key for key in mine.parts if key.partition("_")[0] in roles}
    if unmatched := sorted(wanted ^ set(offered)):
        raise PatchError(
            f"no counterpart for {unmatched}: the student's {mine.name} has {sorted(wanted)}, the "
            f"teacher's {theirs.name} has adapters on {sorted(offered)}"
        )
    for key in wanted:
        if key.startswith("fc") and _packed(mine, key) != _packed(theirs, key):
            raise PatchError(
                f"the gate and the value of {mine.name} and {theirs.name} are packed in one linear "
                "in only one of the two: their halves cannot be told apart"
            )


def _packed(block: Block, key: str) -> bool:
    return sum(part.name == block.parts[key].name for part in block.parts.values()) > 1


def _deal(
    name: str, parts: list[Part], offered: dict[str, tuple[Part, SharedAdapter]], rank: int | None
) -> Deal:
    try:
        linear = check_adoptable(parts[0].module, f"the student's {name}")
    except TypeError as error:
        raise PatchError(str(error)) from None
    shared = [part for part in parts if part.key in offered]
    loans = {
        part.key if len(parts) > 1 else "": _loan(linear, part, *offered[part.key], rank)
        for part in shared
    }
    configs = [loan.owner.config for loan in loans.values()]
    if len({(config.dropout, config.impl, config.base_dtype) for config in configs}) > 1:
        raise PatchError(f"{name}: the teacher's adapters for it differ in dropout, impl or base")
    return Deal(name, linear, tuple(part.key for part in shared), loans, configs[0])


def _loan(
    linear: nn.Linear, mine: Part, theirs: Part, whole: SharedAdapter, rank: int | None
) -> SharedAdapter:
    k, n = linear.in_features, mine.stop - mine.start
    wide, tall = whole.owner.in_features, whole.span.width
    if k > wide or n > tall:
        raise PatchError(
            f"the student's {mine.name} ({mine.key}) is [{n}, {k}], the teacher's {theirs.name} "
            f"[{tall}, {wide}]: a student may be no wider than its teacher"
        )
    r = whole.span.rank if rank is None else rank
    try:
        check_rank(r, mine.name)
    except ValueError as error:
        raise PatchError(str(error)) from None
    if r > whole.span.rank:
        raise PatchError(
            f"rank {r} is above that of the teacher's {theirs.name}, {whole.span.rank}"
        )
    a, _ = whole.owner.adapter(whole.group)
    if a.device != linear.weight.device:
        raise PatchError(
            f"the student's {mine.name} is on {linear.weight.device}, the teacher's on {a.device}"
        )
    return SharedAdapter(whole.owner, whole.group, whole.first, Span(mine.start, mine.stop, r))
