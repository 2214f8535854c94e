"""What trains besides the adapters, a head say: kept as PEFT keeps ``modules_to_save``.

PEFT replaces every module whose dotted name *ends with* an entry ("norm" is also "fc_norm"), and
expects the whole state of each in the file, buffers and frozen parameters included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from fused_lora.io.errors import AdapterFileError
from fused_lora.io.keys import PREFIX, adapted, module_names, plain, some
from fused_lora.nn import AdaptedLinear


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
            raise AdapterFileError(_no_place(name, f"would be saved whole, with {some(clash)}"))
    for target in targets:
        if any(re.match(rf"(^|.*\.){entry}($|\..*)", target) for entry in entries):
            raise AdapterFileError(_no_place(some(entries), f"would keep PEFT from {target}"))


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
