"""What a caller gives, checked before anything is done: errors name it, and show it in one line.

Each check raises ``error``, ValueError or the caller's own kind; all but ``one_of`` hand on what
they were given.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor, nn

_short = Repr()
_short.maxstring = 160
_short.maxother = 80
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = _short.maxfrozenset = 6
_short.maxlevel = 2

Error = type[ValueError | TypeError]


def brief(value: object) -> str:
    """``value`` as an error shows it: one short line, of a tensor its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, nn.Module):
        return f"a module {type(value).__name__}"
    if isinstance(value, str | bytes | int | float | None | torch.dtype):
        return _short.repr(value)
    if isinstance(value, Mapping | Sequence | set | frozenset):
        inside = value.values() if isinstance(value, Mapping) else value
        plain = all(not isinstance(each, Tensor | nn.Module) for each in inside)
        return _short.repr(value) if plain else f"a {type(value).__name__} of {len(value)}"
    return " ".join(_short.repr(value).split())


# What PEFT calls some options.
PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_dora": "dora",
    "use_rslora": "rank_stabilized",
    "init_lora_weights": "init",
    "target_modules": "targets",
    "modules_to_save": "trainable",
    "layers_to_transform": "layers",
    "exclude_modules": "exclude",
}


def check_known(caller: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises TypeError for an option that ``caller`` does not have, with the one that was meant."""
    for name in given:
        if name in known:
            continue
        meant = [PEFT[name]] if PEFT.get(name) in known else get_close_matches(name, known, 1)
        hint = f"did you mean {meant[0]!r}?" if meant else f"its options are {', '.join(known)}"
        raise TypeError(f"{caller} has no option {name!r}; {hint}")


def module_of(model: nn.Module, name: str = "model", error: Error = ValueError) -> nn.Module:
    """A module."""
    if not isinstance(model, nn.Module):
        raise error(f"{name}: expected a torch.nn.Module, got {brief(model)}")
    return model


def whole(name: str, value: int, least: int | None = 1, error: Error = ValueError) -> int:
    """A whole number, of ``least`` or more."""
    right = isinstance(value, int) and not isinstance(value, bool)
    if not right or (least is not None and value < least):
        bound = "" if least is None else f" from {least} on"
        raise error(f"{name} must be a whole number{bound}, got {brief(value)}")
    return value


def number(name: str, value: float, error: Error = ValueError) -> float:
    """A finite number."""
    right = isinstance(value, Real) and not isinstance(value, bool)  # numpy's too
    if not right or not math.isfinite(value):
        raise error(f"{name} must be {'finite' if right else 'a number'}, got {brief(value)}")
    return value


def flag(name: str, value: bool, error: Error = ValueError) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, got {brief(value)}")
    return value


def one_of(
    name: str,
    value: str | None,
    words: Sequence[str],
    error: Error = ValueError,
    *,
    none: bool = False,  # which may stand in their place
) -> None:
    """One of ``words``."""
    if (none and value is None) or (isinstance(value, str) and value in words):
        return
    raise error(f"{name} must be {'None or ' * none}one of {words}, got {brief(value)}")


def strings(name: str, value: Iterable[str] | str, error: Error = ValueError) -> tuple[str, ...]:
    """Strings, or one alone."""
    if isinstance(value, str):
        return (value,)
    iterable = isinstance(value, Iterable) and not isinstance(value, Mapping | Tensor | bytes)
    listed = tuple(value) if iterable else ()
    if not iterable or not all(isinstance(each, str) for each in listed):
        raise error(f"{name} must be a string, or several, got {brief(value)}")
    return listed


def by_string(name: str, value: Mapping[str, Any], error: Error = ValueError) -> Mapping[str, Any]:
    """A mapping whose keys are strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise error(f"{name} must be a mapping from strings, got {brief(value)}")
    return value


def folder_of(
    folder: str | os.PathLike[str], name: str = "folder", error: Error = ValueError
) -> Path:
    """A path that is not empty."""
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise error(f"{name} must be a path, got {brief(folder)}")
    return Path(folder)


def device_of(device: torch.device | str, name: str = "device") -> torch.device:
    """A device, by torch's names."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{name} must be a torch device, got {brief(device)}") from None


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN.

    The least and the largest tell, where they are to be had: see ``docs/hardware_notes.md``.
    """
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch asks nothing of these
        tensor = tensor.float()
    if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.numel():
        tensor = torch.stack(torch.aminmax(tensor.detach()))
    return bool(torch.isfinite(tensor).all())
