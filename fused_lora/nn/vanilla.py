"""Whether a checkpoint that is being loaded has adapters anywhere: if none, it loads strictly.

While a state dict is loaded a module sees its own keys alone, and the list of missing keys, which
is one for the whole of a load. So modules that find none of their adapters' keys are forgiven until
one is found somewhere; then they are missing after all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable


class _Load(threading.local):
    """The load that is going on in this thread, told by its list."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.forgiven: list[str] = []
        self.found = False  # an adapter's key, anywhere


_load = _Load()


def settle(
    missing_keys: list[str],  # of the whole load
    unexpected_keys: Iterable[str],  # likewise
    own: Iterable[str],  # one module's adapters
    missing: Iterable[str],  # the module's keys that were not there
) -> bool:
    """Add what of ``own`` is missing to the load's list; whether the module is forgiven so far."""
    if _load.missing is not missing_keys:
        _load.missing, _load.forgiven, _load.found = missing_keys, [], False
    own, missing = list(own), set(missing)
    lacking = [key for key in own if key in missing]
    if len(lacking) < len(own) or any(_of_adapter(key) for key in unexpected_keys):
        _load.found = True
        missing_keys += _load.forgiven
        _load.forgiven = []
    if _load.found:
        missing_keys += lacking
        return False
    _load.forgiven += lacking
    return True


def _of_adapter(key: str) -> bool:
    return key.rpartition(".")[2].startswith("lora_") or ".lora_" in key
