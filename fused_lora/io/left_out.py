"""What a file adapts and the model does not: named, and left out where that is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from fused_lora.io.errors import AdapterFileError
from fused_lora.io.keys import ASIDE, PREFIX, some
from fused_lora.nn.kernel import why_not_kernel

ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_A", ".lora_B")


def module_of(key: str) -> str:
    """The module that a key of the file belongs to; of a whole module's, with the tensor's name."""
    name = key.removeprefix(PREFIX).removeprefix(ASIDE)
    return next((name.removesuffix(end) for end in ENDINGS if name.endswith(end)), name)


@dataclass(frozen=True)
class LeftOut:
    """The keys that the caller of ``load`` leaves out."""

    keys: frozenset[str]

    @classmethod
    def by(
        cls, patterns: Iterable[str] | str, keys: Iterable[str], whole: Iterable[str]
    ) -> LeftOut:
        """Those whose module matches; raises AdapterFileError for a pattern that matches none."""
        listed, keys = [patterns] if isinstance(patterns, str) else list(patterns), list(keys)
        left: set[str] = set()
        for pattern in listed:
            try:
                hit = {key for key in keys if re.search(pattern, module_of(key))}
            except re.error as error:
                raise AdapterFileError(
                    f"leave_out: {pattern!r} is no regular expression: {error}"
                ) from None
            if not hit:
                raise AdapterFileError(
                    f"leave_out: {pattern!r} matches nothing in the file, which has "
                    f"{some({module_of(key) for key in keys})}"
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
    strange = {module_of(key) for key in adapters if not key.startswith(ASIDE)} - adapted
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
