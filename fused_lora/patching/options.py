"""The choices of ``patch``: which roles, which rank where."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fused_lora.nn import AdapterConfig
from fused_lora.patching.errors import PatchError
from fused_lora.types import ALL_ROLES, Role

QKV_MODES = ("separate", "joint")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Selection:
    """Which of the projections found are taken."""

    layers: frozenset[int] | None = None  # None for every block
    exclude: tuple[str, ...] = ()  # regular expressions on dotted names
    keep_forward: bool = False  # take linears of other classes, with their own forward


@dataclass(frozen=True)
class Choice:
    """What the caller of ``patch`` asked for, of every projection alike."""

    config: AdapterConfig
    rank: int
    roles: tuple[Role, ...]
    qkv: str  # one of QKV_MODES
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    allow_large_rank: bool
    only: Any = None  # a LoraConfig that names modules
    selection: Selection = Selection()


def roles_of(targets: Iterable[Role | str] | str | None) -> tuple[Role, ...]:
    """The roles asked for; None for all six."""
    if targets is None:
        return ALL_ROLES
    names = [targets] if isinstance(targets, str) else list(targets)
    try:
        roles = tuple(dict.fromkeys(Role(name) for name in names))
    except ValueError as error:
        raise PatchError(f"targets: {error}; the roles are {[r.value for r in Role]}") from None
    if not roles:
        raise PatchError("targets is empty: name at least one role")
    return roles


def block_numbers(layers: Iterable[int] | int | None) -> frozenset[int] | None:
    """The block numbers asked for; None for all."""
    if layers is None:
        return None
    numbers = [layers] if isinstance(layers, int) else list(layers)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise PatchError(f"layers: block numbers are whole and from 0 on, got {number!r}")
    if not numbers:
        raise PatchError("layers is empty: name at least one block")
    return frozenset(numbers)


def layer_of(name: str) -> int | None:
    """The number in a dotted name, its block's: 3 of ``blocks.3.mlp.fc1``.

    torchvision writes ``encoder_layer_3``, and numbers the linears of the MLP inside.
    """
    found = (re.fullmatch(r"(?:\w*layer_)?(\d+)", part) for part in name.split("."))
    return next((int(match[1]) for match in found if match), None)


def selected(names: Iterable[str], choice: Selection) -> set[str]:
    """The names that ``layers`` and ``exclude`` leave; raises PatchError where one hits nothing."""
    names = set(names)
    left = set(names)
    for key in choice.exclude:
        try:
            hit = {name for name in names if re.search(key, name)}
        except (re.error, TypeError) as error:
            raise PatchError(f"exclude: {key!r} is no regular expression: {error}") from None
        if not hit:
            raise PatchError(f"exclude: {key!r} matches no projection's name")
        left -= hit
    if choice.layers is not None:
        there = {layer for name in names if (layer := layer_of(name)) is not None}
        if missing := choice.layers - there:
            raise PatchError(f"layers: no block {sorted(missing)}; the model has {sorted(there)}")
        left = {name for name in left if layer_of(name) in choice.layers}
    if names and not left:
        raise PatchError(
            f"layers={choice.layers and sorted(choice.layers)} and exclude={list(choice.exclude)} "
            "leave no projection"
        )
    return left


def check_patterns(patterns: Mapping[str, float], option: str, names: Iterable[str]) -> None:
    """Raises PatchError for a key that is neither a role nor matches any module's name."""
    names = list(names)
    for key in patterns:
        if key in {role.value for role in Role}:
            continue
        try:
            if any(re.search(key, name) for name in names):
                continue
        except re.error as error:
            raise PatchError(f"{option}: {key!r} is no regular expression: {error}") from None
        raise PatchError(f"{option}: {key!r} is no role and matches no projection's name")


def value_for(
    patterns: Mapping[str, Number], name: str, role: Role | None, default: Number
) -> Number:
    """A name's pattern goes before its role's, its role's before the default."""
    for key, value in patterns.items():
        if key not in {role.value for role in Role} and re.search(key, name):
            return value
    return default if role is None else patterns.get(role.value, default)
