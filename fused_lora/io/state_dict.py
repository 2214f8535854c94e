"""Adapters as tensors under PEFT's keys; every value is checked before any is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fused_lora.io.errors import AdapterFileError
from fused_lora.io.fuse import Group, fuse, groups_of, split, total_rank
from fused_lora.io.keys import (
    a_key,
    adapted,
    aside_key,
    b_key,
    bare,
    check_keys,
    magnitude_key,
    unmerged,
)
from fused_lora.io.written import Written, rest_of, uncovered, why_not_into, written
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.variants import key_of
from fused_lora.ops.sharded import like


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a patched model's adapters: ``base_model.model.<module>.lora_A.weight`` [R, K], ...

    Separate adapters on one linear come as the one adapter they are together (``io/fuse.py``).
    The scales are no tensors: ``save`` keeps them, this does not. Where the model is sharded
    (FSDP2) the tensors come whole, and every process must call this.

    Raises:
        AdapterFileError: no adapters, values that are not finite, no values yet (meta), or ``mid``
            or an init (pissa, olora) that ``save`` alone can write.
    """
    modules = adapted(bare(model))
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
        a, b, aside = fuse(groups, pairs, modules[name].out_features)
        state |= {a_key(name): a, b_key(name): b}
        state |= {aside_key(name, group): tensor for group, tensor in aside.items()}
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
    modules = writable(bare(model))
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
    aside = {aside_key(name, g.name) for name in modules for g in groups[name] if g.factor != 1.0}
    halves = {key(name) for name in modules for key in (a_key, b_key)}
    halves |= {magnitude_key(name) for name, module in modules.items() if module.config.dora}
    check_keys(where, halves | (aside & set(state)), state)
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
        aside = aside_key(name, group.name)
        changes.add(own_a, value_a, f"{where}: {a_key(name)}")
        changes.add(own_b, state.get(aside, value_b), f"{where}: {b_key(name)}")
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
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise AdapterFileError(f"{where} holds {bad} non-finite values of {tensor.numel()}")


def checked(value: Tensor, destination: Tensor, where: str) -> Tensor:
    """``value`` in the destination's dtype; raises AdapterFileError if it has no place there."""
    check_shape(value, tuple(destination.shape), where)
    check_values(value, where)
    if destination.is_meta:
        raise AdapterFileError(f"{where}: the model holds no values there yet: it is on meta")
    return value.to(destination.dtype)
