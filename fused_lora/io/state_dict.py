"""Adapters as a state dict, and a state dict into adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.arguments import all_finite, by_string, flag
from fused_lora.io.fuse import Group, fuse, groups_of, split, total_rank
from fused_lora.io.keys import (
    AdapterFileError,
    a_key,
    adapted,
    b_key,
    check_keys,
    magnitude_key,
    shortened,
    unfolded_key,
    unmerged,
    unwrapped,
)
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.config import CHANGES_BASE, draw
from fused_lora.nn.variants import folded, key_of
from fused_lora.ops.operand import gathered, is_sharded, like

# What a module's adapters are in PEFT's words: w + s b a on the base it came with.
#
#     mid           b mid for b                     only where the caller asks: mid itself is lost
#     pissa, olora  a' = [a; a0]  b' = [b, -b0]     on w, which PEFT has, for a and b on w - s b0 a0
#     dora          |w| for the rows that no adapter owns, so that their factor is 1
#
# a0 and b0 are drawn again from the original weight, and held against the base that is there.


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


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a patched model's adapters: ``base_model.model.<module>.lora_A.weight`` [R, K], ...

    Separate adapters on one linear come as the one adapter they are together (``io/fuse.py``).
    The scales are no tensors: ``save`` keeps them, this does not. Where the model is sharded
    (FSDP2) the tensors come whole, and every process must call this.

    Raises:
        AdapterFileError: no adapters, values that are not finite, no values yet (meta), or ``mid``
            or an init (pissa, olora) that ``save`` alone can write.
    """
    modules = adapted(unwrapped(model))
    for name, module in modules.items():
        if reason := why_not_into(module):
            raise AdapterFileError(f"{name} {reason}")
    return tensors_of({name: values_of(module, name) for name, module in modules.items()}, modules)


def values_of(module: AdaptedLinear, name: str, fold_mid: bool = False) -> Written:
    """The adapters of the module ``name``, whose values are checked first."""
    for own_a, own_b in module.adapters():
        check_values(own_a, a_key(name))
        check_values(own_b, b_key(name))
    return written(module, name, fold_mid)


def tensors_of(
    held: Mapping[str, Written], modules: Mapping[str, AdaptedLinear]
) -> dict[str, Tensor]:
    """The tensors of every module, by PEFT's keys."""
    state: dict[str, Tensor] = {}
    for name, (groups, pairs, magnitude) in held.items():
        a, b, unfolded = fuse(groups, pairs, modules[name].out_features)
        state |= {a_key(name): a, b_key(name): b}
        state |= {unfolded_key(name, group): tensor for group, tensor in unfolded.items()}
        if magnitude is not None:
            check_values(magnitude, magnitude_key(name))
            state[magnitude_key(name)] = magnitude
    return state


def load_lora_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, allow_rounding: bool = False
) -> None:
    """Copy tensors as from ``lora_state_dict`` into a model patched alike; the scales stay.

    ``allow_rounding`` is as in ``load``.

    Raises:
        AdapterFileError: not patched, merged, or a key, shape or value that does not fit; the
            model is left as it was.
    """
    flag("allow_rounding", allow_rounding, AdapterFileError)
    by_string("state", state, AdapterFileError)
    if other := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise AdapterFileError(f"state: {shortened(other)}: expected tensors")
    modules = writable(unwrapped(model))
    groups = {name: groups_of(module) for name, module in modules.items()}
    changes = adapter_changes(modules, state, groups, "the state dict")
    changes.check_rounding(allow_rounding)
    changes.apply()


@dataclass
class Changes:
    """What a load will do, decided in full before it is done."""

    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (destination, value)
    scales: list[tuple[AdaptedLinear, str, float]] = field(default_factory=list)
    rounded: list[tuple[str, torch.dtype, torch.dtype]] = field(default_factory=list)

    def add(self, destination: Tensor, value: Tensor, where: str) -> None:
        """Note one copy, and whether it is exact; raises AdapterFileError where it cannot be."""
        cast = checked(value, destination, where)
        if not torch.equal(cast.to(value.dtype), value):
            self.rounded.append((where, value.dtype, destination.dtype))
        self.tensors.append((destination, cast))

    def check_rounding(self, allowed: bool = False) -> None:
        """Raises AdapterFileError where a copy would round, unless that is ``allowed``."""
        if not self.rounded or allowed:
            return
        where, given, own = self.rounded[0]
        adapter = "lora_" in where
        cure = (
            f"patch with adapter_dtype={given}"
            if adapter
            else f"convert that module to {given} (and run under torch.autocast)"
        )
        more = f" (and {len(self.rounded) - 1} more)" if len(self.rounded) > 1 else ""
        raise AdapterFileError(
            f"{where} is {given} and the model's is {own}, which would round it{more}: {cure}, or "
            "round it knowingly with allow_rounding=True"
        )

    def apply(self) -> None:
        """Do it."""
        with torch.no_grad():
            for destination, value in self.tensors:
                destination.copy_(like(value, destination))
        for module, group, scale in self.scales:
            module.set_scale(scale, group)


def adapter_changes(
    modules: Mapping[str, AdaptedLinear],
    state: Mapping[str, Tensor],
    groups: Mapping[str, Sequence[Group]],
    where: str,
) -> Changes:
    """The changes that put ``state`` into ``modules``, each split by its ``groups``."""
    unfolded = {
        unfolded_key(name, g.name) for name in modules for g in groups[name] if g.factor != 1.0
    }
    halves = {key(name) for name in modules for key in (a_key, b_key)}
    halves |= {magnitude_key(name) for name, module in modules.items() if module.config.dora}
    check_keys(where, halves | (unfolded & set(state)), state)
    changes = Changes()
    for name, module in modules.items():
        _one_module(changes, name, module, state, groups[name], where)
        if module.config.dora:
            _magnitudes(changes, module, state[magnitude_key(name)], f"{where}: {name}")
    return changes


def writable(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted linears that tensors can be copied into; raises AdapterFileError for others."""
    found = unmerged(model)
    for name, module in found.items():
        if reason := why_not_into(module):
            raise AdapterFileError(f"{name} {reason}")
    return found


def _magnitudes(changes: Changes, module: AdaptedLinear, magnitude: Tensor, where: str) -> None:
    check_shape(magnitude, (module.out_features,), f"{where}.lora_magnitude_vector")
    check_values(magnitude, f"{where}.lora_magnitude_vector")
    free = uncovered(module)
    if free.any():
        plain, given = rest_of(module)[free], magnitude[free]
        off = float((given.to(plain) / plain - 1).abs().max())
        if off > 16 * torch.finfo(magnitude.dtype).eps:
            raise AdapterFileError(
                f"{where}.lora_magnitude_vector scales rows that carry no adapter here (by up to "
                f"{off:.1e}): patch q, k and v together"
            )
    for name, span in module.groups.items():
        own = getattr(module, key_of("lora_magnitude", name))
        changes.add(own, magnitude[span.start : span.stop], f"{where}.lora_magnitude_vector")


def _one_module(
    changes: Changes,
    name: str,
    module: AdaptedLinear,
    state: Mapping[str, Tensor],
    groups: Sequence[Group],
    where: str,
) -> None:
    rank, a, b = total_rank(groups), state[a_key(name)], state[b_key(name)]
    check_shape(a, (rank, module.in_features), f"{where}: {a_key(name)}")
    check_shape(b, (module.out_features, rank), f"{where}: {b_key(name)}")
    for key in (a_key(name), b_key(name)):
        check_values(state[key], f"{where}: {key}")
    pairs = split(a, b, groups, f"{where}: {b_key(name)}")
    for group in groups:
        own_a, own_b = module.adapter(group.name)
        value_a, value_b = pairs[group.name]
        unfolded = unfolded_key(name, group.name)
        changes.add(own_a, value_a, f"{where}: {a_key(name)}")
        changes.add(own_b, state.get(unfolded, value_b), f"{where}: {b_key(name)}")
        changes.scales.append((module, group.name, group.scale))


def check_shape(tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    """Raises AdapterFileError unless ``tensor`` has ``shape``."""
    if tuple(tensor.shape) != tuple(shape):
        raise AdapterFileError(
            f"{where} has shape {tuple(tensor.shape)}, the model's has {tuple(shape)}"
        )


def check_values(tensor: Tensor, where: str) -> None:
    """Raises AdapterFileError for values that are not finite, or not there."""
    if tensor.is_meta:
        raise AdapterFileError(f"{where} holds no values: it is a meta tensor")
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterFileError(f"{where} holds {bad} non-finite values of {tensor.numel()}")


def checked(value: Tensor, destination: Tensor, where: str) -> Tensor:
    """``value`` in the destination's dtype; raises AdapterFileError if it has no place there."""
    check_shape(value, tuple(destination.shape), where)
    check_values(value, where)
    if destination.is_meta:
        raise AdapterFileError(f"{where}: the model holds no values there yet: it is on meta")
    return value.to(destination.dtype)
