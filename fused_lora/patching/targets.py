"""Each linear to adapt, decided in full before anything is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from fused_lora.nn import AdaptedLinear, AdapterConfig
from fused_lora.nn.adapted import check_adoptable, check_rank
from fused_lora.nn.around import opaque
from fused_lora.ops.lora_linear_checks import DTYPES
from fused_lora.patching.errors import PatchError
from fused_lora.patching.options import QKV_MODES, Choice, check_patterns, selected, value_for
from fused_lora.patching.rule import Found, find
from fused_lora.types import Role


@dataclass(frozen=True)
class Target:
    """One linear to adapt."""

    found: Found
    linear: nn.Linear
    spans: dict[str, tuple[int, int]]  # group name to columns; {"": (0, N)} for all of y
    ranks: dict[str, int]
    config: AdapterConfig


def choose_targets(model: nn.Module, choice: Choice) -> list[Target]:
    """The linears of ``model`` to adapt; raises PatchError where one cannot be."""
    if choice.qkv not in QKV_MODES:
        raise PatchError(f"qkv must be one of {QKV_MODES}, got {choice.qkv!r}")
    found = [each for each in find(model) if set(each.roles) & set(choice.roles)]
    if not found:
        raise PatchError(_nothing_found(model, choice))
    left = selected((each.name for each in found), choice)
    found = [each for each in found if each.name in left]
    names = [each.name for each in found]
    check_patterns(choice.rank_pattern, "rank_pattern", names)
    check_patterns(choice.alpha_pattern, "alpha_pattern", names)
    once: dict[nn.Module, Found] = {}  # a linear that two attentions share is adapted once
    for each in found:
        once.setdefault(each.module, each)
    return [_target(each, choice) for each in once.values()]


def _nothing_found(model: nn.Module, choice: Choice) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)})
    inside = sorted(
        {type(m).__name__ for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    )
    return (
        f"no projection with a role in {[role.value for role in choice.roles]} found in "
        f"{type(model).__name__}: looked for attentions with (qkv, proj) or (q_proj, k_proj, "
        "v_proj, proj) and MLPs with (fc1, fc2) or (fc1_g, fc1_x, fc2); the model has linears of "
        f"type {kinds or 'none'}" + (f" and {inside}, which calls no linear" if inside else "")
    )


def _target(found: Found, choice: Choice) -> Target:
    linear = _adoptable(found, choice.keep_forward)
    spans = _spans(found, linear.out_features, choice)
    roles = {name: Role(name) if name else found.roles[0] for name in spans}
    ranks = {
        name: value_for(choice.rank_pattern, found.name, role, choice.rank)
        for name, role in roles.items()
    }
    for name, (start, stop) in spans.items():
        try:
            check_rank(ranks[name], found.name)
        except ValueError as error:
            raise PatchError(str(error)) from None
        full = min(linear.in_features, stop - start)
        if ranks[name] > full and not choice.allow_large_rank:
            raise PatchError(
                f"{found.name}: rank {ranks[name]} is above min(in_features, columns) = "
                f"min({linear.in_features}, {stop - start}), where an adapter costs more than it "
                "can express; allow_large_rank=True accepts it"
            )
    alphas = {value_for(choice.alpha_pattern, found.name, r, math.nan) for r in roles.values()}
    return Target(found, linear, spans, ranks, _with_alpha(choice.config, alphas, found.name))


def _adoptable(found: Found, keep_forward: bool) -> nn.Linear:
    if keep_forward and opaque(found.module) and not isinstance(found.module, AdaptedLinear):
        return cast(nn.Linear, found.module)
    try:
        linear = check_adoptable(found.module, found.name)
    except TypeError as error:
        raise PatchError(str(error)) from None
    if linear.weight.dtype not in DTYPES:
        raise PatchError(f"{found.name}.weight is {linear.weight.dtype}; {DTYPES} are served")
    if not linear.weight.is_meta and not bool(torch.isfinite(linear.weight).all()):
        bad = int((~torch.isfinite(linear.weight)).sum())
        raise PatchError(f"{found.name}.weight holds {bad} non-finite values")
    return linear


def _with_alpha(config: AdapterConfig, alphas: set[float], name: str) -> AdapterConfig:
    given = {alpha for alpha in alphas if not math.isnan(alpha)}
    if not given:
        return config
    if len(alphas) > 1:
        raise PatchError(f"alpha_pattern gives {name} several alphas {sorted(given)}; give it one")
    return replace(config, alpha=given.pop(), scale=None)


def _spans(found: Found, n: int, choice: Choice) -> dict[str, tuple[int, int]]:
    every = set(found.roles) <= set(choice.roles)
    if len(found.roles) == 1 or (choice.qkv == "joint" and every):
        return {"": (0, n)}
    width = n // len(found.roles)
    return {
        role.value: (i * width, (i + 1) * width)
        for i, role in enumerate(found.roles)
        if role in choice.roles
    }
