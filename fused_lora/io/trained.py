"""Parameters that train beside the adapters, and modules that an adapter file leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fused_lora.arguments import brief
from fused_lora.io.keys import (
    PREFIX,
    UNFOLDED,
    AdapterFileError,
    adapted,
    module_names,
    plain,
    shortened,
)
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.child_adapters import why_not_kernel

# What trains besides the adapters, a head say: kept as PEFT keeps ``modules_to_save``.
#
# PEFT replaces every module whose dotted name *ends with* an entry ("norm" is also "fc_norm"), and
# expects the whole state of each in the file, buffers and frozen parameters included.


def trained_modules(model: nn.Module) -> list[str]:
    """The modules that own a parameter which trains and is no adapter's.

    Raises:
        AdapterFileError: PEFT's format has no place for one of those parameters.
    """
    owners = {}
    for name in _trained_parameters(model):
        owner, _, short = name.rpartition(".")
        if not owner or isinstance(module_names(model)[owner], AdaptedLinear):
            whose = f"{owner}, which carries adapters" if owner else "the model itself"
            raise AdapterFileError(_no_place(name, f"belongs to {whose}"))
        owners[owner] = short
    found = [n for n in owners if not any(n.startswith(f"{other}.") for other in owners)]
    _check_wrapped(model, found)
    return found


def _trained_parameters(model: nn.Module) -> list[str]:
    own = {id(p) for module in adapted(model).values() for p in module.lora_parameters()}
    named = model.named_parameters()
    return [plain(name) for name, p in named if p.requires_grad and id(p) not in own]


def _no_place(name: str, reason: str) -> str:
    return (
        f"{name} trains, but PEFT's format has no place for it: it {reason}. Save it yourself and "
        "pass trainable=False, or freeze it"
    )


def _check_wrapped(model: nn.Module, entries: list[str]) -> None:
    targets = adapted(model)
    wrapped = wrapped_modules(model, entries)
    for name in wrapped:
        clash = [t for t in targets if t == name or t.startswith(f"{name}.")]
        clash += [other for other in wrapped if other.startswith(f"{name}.")]
        if clash:
            raise AdapterFileError(
                _no_place(name, f"would be saved whole, with {shortened(clash)}")
            )
    for target in targets:
        if any(re.match(rf"(^|.*\.){entry}($|\..*)", target) for entry in entries):
            raise AdapterFileError(_no_place(shortened(entries), f"would keep PEFT from {target}"))


def wrapped_modules(model: nn.Module, entries: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that PEFT would replace for these ``modules_to_save``."""
    endings = tuple(entries)
    return {name: m for name, m in module_names(model).items() if name.endswith(endings)}


def whole_state(model: nn.Module, entries: Iterable[str]) -> dict[str, Tensor]:
    """The state of every module that PEFT would replace, under PEFT's keys, not copied."""
    return {
        f"{PREFIX}{name}.{plain(key)}": tensor
        for name, module in wrapped_modules(model, entries).items()
        for key, tensor in module.state_dict().items()
    }


SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_A", ".lora_B")


def module_of(key: str) -> str:
    """The module that a key of the file belongs to; of a whole module's, with the tensor's name."""
    name = key.removeprefix(PREFIX).removeprefix(UNFOLDED)
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


@dataclass(frozen=True)
class LeftOut:
    """The keys that the caller of ``load`` leaves out."""

    keys: frozenset[str]

    @classmethod
    def by(cls, patterns: Iterable[str], keys: Iterable[str], whole: Iterable[str]) -> LeftOut:
        """Those whose module matches; raises AdapterFileError for a pattern that matches none."""
        keys = list(keys)
        left: set[str] = set()
        for pattern in patterns:
            try:
                hit = {key for key in keys if re.search(pattern, module_of(key))}
            except re.error as error:
                raise AdapterFileError(
                    f"leave_out: {brief(pattern)} is no regular expression: {error}"
                ) from None
            if not hit:
                raise AdapterFileError(
                    f"leave_out: {brief(pattern)} matches nothing in the file, which has "
                    f"{shortened({module_of(key) for key in keys})}"
                )
            left |= hit
        return cls(frozenset(left))

    def holds(self, key: str) -> bool:
        """Whether ``key`` is left out."""
        return key in self.keys


def check_adapted(
    names: Mapping[str, nn.Module],
    modules: Iterable[str],
    adapters: Iterable[str],
    where: str,
) -> None:
    """Raises AdapterFileError where the file adapts modules that are there, but not adapted."""
    adapted = set(modules)
    strange = {module_of(key) for key in adapters if not key.startswith(UNFOLDED)} - adapted
    known = {name: names[name] for name in sorted(strange) if name in names}
    if not known or strange - known.keys():
        return  # names of another release, or of another model: said elsewhere
    kinds = {name: type(module).__name__ for name, module in known.items()}
    adaptable = [
        name
        for name, module in known.items()
        if isinstance(module, nn.Linear) or not why_not_kernel(module)
    ]
    cure = (
        "patch the model as it was, patch(model, peft.LoraConfig.from_pretrained(folder))"
        if adaptable
        else "none of them can be adapted here"
    )
    more = f" and {len(kinds) - 3} more" if len(kinds) > 3 else ""
    shown = ", ".join(f"{name} (a {kind})" for name, kind in list(kinds.items())[:3])
    raise AdapterFileError(
        f"{where}: the file adapts {shown}{more}, which the model was not patched for: {cure}; "
        f"load(..., leave_out={list(kinds)[:3]}) loads the rest"
    )
