"""Each linear to adapt, decided in full before anything is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fused_lora.arguments import all_finite, one_of
from fused_lora.nn import AdapterConfig
from fused_lora.nn.adapted import check_adoptable, check_rank
from fused_lora.nn.additive import hides_weight, why_not_additive
from fused_lora.nn.child_adapters import is_convolution, why_not_kernel
from fused_lora.nn.config import OF_WEIGHT
from fused_lora.nn.stand_in import made_weight, offloaded, why_not_replaceable
from fused_lora.nn.weight_adapter import READABLE
from fused_lora.ops.lora_linear_plain import DTYPES
from fused_lora.patching.observe import Columns, ObservedWeight, alike
from fused_lora.patching.options import (
    QKV_MODES,
    Choice,
    Named,
    check_patterns,
    layer_of,
    selected,
    value_for,
)
from fused_lora.patching.report import PatchError
from fused_lora.patching.rules import FoundProjection, find
from fused_lora.types import ALL_ROLES, Role

BARE = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of an attention


@dataclass(frozen=True)
class Target:
    """One weight to adapt."""

    found: FoundProjection
    spans: dict[str, tuple[int, int]]  # group name to columns; {"": (0, N)} for all of y
    ranks: dict[str, int]
    config: AdapterConfig
    read: bool = False  # by others, without a call of its module
    scales: dict[str, float] = field(default_factory=dict)  # by group, where they differ

    @property
    def weight(self) -> Tensor:
        """The frozen weight [N, K]."""
        return _weight(self.found)


def find_wanted(model: nn.Module, choice: Choice) -> list[FoundProjection]:
    """The projections that ``choice`` asks for; raises PatchError where one cannot be adapted."""
    one_of("qkv", choice.qkv, QKV_MODES, PatchError)
    _refuse_made_weights(model)
    found = [each for each in find(model) if set(each.roles) & set(choice.roles)]
    if not found:
        raise PatchError(_nothing_found(model, choice))
    missing = missing_roles(found, choice)
    if missing and choice.roles != ALL_ROLES:
        has = sorted({role.value for each in find(model) for role in each.roles})
        raise PatchError(
            f"targets: {type(model).__name__} has no projection with role {', '.join(missing)}; it "
            f"has {has}"
        )
    left = selected((each.name for each in found), choice.selection)
    found = [each for each in found if each.name in left]
    if choice.only is not None:
        found = _named(model, found, choice)
    names = [each.name for each in found]
    check_patterns(choice.rank_pattern, "rank_pattern", names)
    check_patterns(choice.alpha_pattern, "alpha_pattern", names)
    once: dict[tuple[nn.Module, str], FoundProjection] = {}  # a linear may be of two attentions
    for each in found:
        once.setdefault((each.module, each.tensor), each)
        if not (choice.selection.keep_forward and keeps_its_forward(each.module)):
            _check_adoptable(model, each)
        elif why := why_not_additive(each.module):
            raise PatchError(f"{each.name}: {why}")
    return list(once.values())


def _named(model: nn.Module, found: list[FoundProjection], choice: Choice) -> list[FoundProjection]:
    """Those that the LoraConfig names, and the linears beside them that it names too."""
    named, names = Named.by(choice.only, model), [each.name for each in found]
    mine = set(named.among(names))
    beside = named.linears_beside(each.name for each in find(model))
    if not choice.config.dropout:  # which drops from images, and not from what a read gives
        beside += named.convolutions()
    leave = choice.selection.exclude
    beside = [name for name in beside if not any(re.search(key, name) for key in leave)]
    if choice.selection.layers is not None:
        beside = [name for name in beside if layer_of(name) in choice.selection.layers]
    named.check(names, [*mine, *beside])
    others = [FoundProjection(name, model.get_submodule(name), ()) for name in beside]
    return [each for each in found if each.name in mine] + others


def unused_beside(
    found: Sequence[FoundProjection], observations: Mapping[str, ObservedWeight]
) -> dict[str, str]:
    """Linears beside the blocks that the model's forward does without: they stay as they are."""
    return {
        each.name: "neither called nor read by the model's forward"
        for each in found
        if not each.roles and not (observations[each.name].called or observations[each.name].read)
    }


def _refuse_made_weights(model: nn.Module) -> None:
    """Bare weights that a hook makes are no parameters, and so no rule would find them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for tensor in BARE:
                if why := made_weight(module, tensor):
                    raise PatchError(f"{name}: {why}")


def missing_roles(found: Sequence[FoundProjection], choice: Choice) -> dict[str, str]:
    """The roles asked for that no projection has."""
    there = {role for each in found for role in each.roles}
    return {r.value: "no projection has this role" for r in choice.roles if r not in there}


def choose_targets(
    model: nn.Module,
    found: Sequence[FoundProjection],
    observations: Mapping[str, ObservedWeight],
    choice: Choice,
) -> list[Target]:
    """What becomes of each projection; raises PatchError where it cannot be served."""
    apart = {alike(f): columns for f in found if (columns := observations[f.name].columns)}
    return [_target(model, f, observations[f.name], apart.get(alike(f), ()), choice) for f in found]


def _nothing_found(model: nn.Module, choice: Choice) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)})
    inside = sorted(
        {type(m).__name__ for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    )
    return (
        f"no projection with a role in {[role.value for role in choice.roles]} found in "
        f"{type(model).__name__}: no block has an attention and an MLP of linears that a rule of "
        "fused_lora/patching/rules.py knows; the model has linears of "
        f"type {kinds or 'none'}" + (f" and {inside}" if inside else "")
    )


def _target(
    model: nn.Module,
    found: FoundProjection,
    observed: ObservedWeight,
    columns: Columns,
    choice: Choice,
) -> Target:
    if not (observed.called or observed.read):
        raise PatchError(
            f"{found.name} is neither called nor read by the model's forward: an adapter there "
            "would silently do nothing"
        )
    read = observed.read or _reads_at_will(model, found) or is_convolution(found.module)
    n, k = _shape(found)
    spans = _spans(found, n, columns, choice)
    first = found.roles[0] if found.roles else None  # a linear beside the blocks
    roles = {name: Role(name) if name else first for name in spans}
    ranks = {
        name: value_for(choice.rank_pattern, found.name, role, choice.rank)
        for name, role in roles.items()
    }
    for name, (start, stop) in spans.items():
        large = choice.allow_large_rank or first is None  # PEFT's words, PEFT's way
        _check_rank(found.name, ranks[name], k, stop - start, large)
    alphas = {
        name: value_for(choice.alpha_pattern, found.name, role, math.nan)
        for name, role in roles.items()
    }
    configs = {name: _with_alpha(choice.config, alpha) for name, alpha in alphas.items()}
    config = next(iter(configs.values()))
    scales = {name: each.scale_for(ranks[name]) for name, each in configs.items()}
    several = len(set(configs.values())) > 1
    if several and config.init in OF_WEIGHT:
        raise PatchError(
            f"{found.name}: init={config.init!r} divides by one scale, and alpha_pattern gives it "
            f"several alphas {alphas}; give it one"
        )
    options = (
        (config.dora, "dora", "y to scale"),
        (config.dropout, f"dropout {config.dropout}", "x to drop from"),
        (config.base_dtype, f"base_dtype={config.base_dtype!r}", "x to quantise"),
    )
    for option, words, missing in options if read else ():
        if option:
            raise PatchError(
                f"{found.name}: {words} cannot be served, since the model reads the weight without "
                f"calling the module: there is no {missing}"
            )
    return Target(found, spans, ranks, config, read, scales if several else {})


def _check_rank(name: str, rank: int, k: int, columns: int, allow_large: bool) -> None:
    try:
        check_rank(rank, name)
    except ValueError as error:
        raise PatchError(str(error)) from None
    if rank > min(k, columns) and not allow_large:
        raise PatchError(
            f"{name}: rank {rank} is above min(in_features, columns) = min({k}, {columns}), where "
            "an adapter costs more than it can express; allow_large_rank=True accepts it"
        )


def _weight(found: FoundProjection) -> Tensor:
    weight = found.module._parameters.get(found.tensor)
    assert weight is not None
    return weight


def _shape(found: FoundProjection) -> tuple[int, int]:
    """[N, K]; a quantised weight may lie there in another shape."""
    module = found.module
    if found.tensor == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    n, k = _weight(found).flatten(1).shape
    return n, k


def keeps_its_forward(module: nn.Module) -> bool:
    """Whether this is a linear of another class, to which adapters can only be added."""
    return hides_weight(module) and type(module) not in READABLE


def _check_adoptable(model: nn.Module, found: FoundProjection) -> None:
    try:
        if is_convolution(found.module):
            assert why_not_kernel(found.module) is None
        elif found.tensor == "weight" and not _reads_at_will(model, found):
            check_adoptable(found.module, found.name)
    except TypeError as error:
        raise PatchError(str(error)) from None
    is_parameter = found.tensor != "weight"  # its owner keeps its forward, and reads
    why = offloaded(found.module) if is_parameter else why_not_replaceable(found.module)
    if why:
        raise PatchError(f"{found.name}: {why}")
    weight = _weight(found)
    where = f"{found.name}.weight" if found.tensor == "weight" else f"{found.name}_weight"
    if weight.dtype not in DTYPES:
        raise PatchError(f"{where} is {weight.dtype}; {DTYPES} are served")
    if not weight.is_meta and not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise PatchError(f"{where} holds {bad} non-finite values")


def _reads_at_will(model: nn.Module, found: FoundProjection) -> bool:
    """Whether torch's own layers read this weight in some of their ways, whatever one forward did.

    An ``nn.TransformerEncoderLayer`` calls its linears in training and reads them in evaluation.
    """
    if found.tensor != "weight":
        return True
    owner = model.get_submodule(found.name.rpartition(".")[0])
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return isinstance(owner, kinds) and type(found.module) in READABLE


def _with_alpha(config: AdapterConfig, alpha: float) -> AdapterConfig:
    return config if math.isnan(alpha) else replace(config, alpha=alpha, scale=None)


def _spans(
    found: FoundProjection, n: int, columns: Columns, choice: Choice
) -> dict[str, tuple[int, int]]:
    wanted = [role for role in found.roles if role in choice.roles]
    if len(found.roles) <= 1:
        return {"": (0, n)}
    if choice.qkv == "joint" and wanted == list(found.roles) and Role.FC1 not in wanted:
        return {"": (0, n)}
    if not columns and found.tensor != "weight":  # q, k and v in equal thirds, by definition
        width = n // len(found.roles)
        columns = tuple((i * width, (i + 1) * width) for i in range(len(found.roles)))
    if not _covers(columns, len(found.roles), n):
        words = "|".join(role.value for role in found.roles)
        raise PatchError(
            f"{found.name}: its {n} columns were not seen to come apart into {words} "
            f"({columns or 'no ranges'} seen), as where every head has its own; "
            'qkv="joint" with all of them among the targets puts one adapter over them'
        )
    both = zip(found.roles, columns, strict=True)
    return {role.value: span for role, span in both if role in choice.roles}


def _covers(columns: Columns, count: int, n: int) -> bool:
    edges = [0, *(stop for _, stop in columns)]
    return len(columns) == count and edges[-1] == n and [s for s, _ in columns] == edges[:-1]
