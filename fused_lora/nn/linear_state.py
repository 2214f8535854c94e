"""What an adapted linear has beside parameters: codes of its weight in FP8, how a file loads."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.ops.operand import is_sharded
from fused_lora.reference.lora_linear_fp8 import Quantised, quantise

# The FP8 codes of a frozen weight, beside the weight, and formed anew when it changes.
#
# They are no buffers: ``.to(torch.bfloat16)`` would cast them, DDP would send them at every step,
# and state dicts hold the weight they come from. Copies and pickles leave them out.


class Formed(NamedTuple):
    """Codes, and of what."""

    weight: Tensor  # [N, K]
    state: tuple[Any, ...]  # of that weight, then
    codes: Quantised


class BaseCodes:
    """Codes and scales of one weight at a time: K + 4 bytes a row."""

    def __init__(self) -> None:
        self._formed: Formed | None = None  # replaced whole: threads may share it

    def of(self, weight: Tensor) -> Quantised:
        """The codes of ``weight`` [N, K].

        Raises:
            RuntimeError: the weight asks for a gradient, or this process holds a part of it.
        """
        if torch.is_grad_enabled() and weight.requires_grad:
            raise RuntimeError(
                "base_dtype='fp8' computes with codes of a frozen weight, and this one has "
                "requires_grad: weight.requires_grad_(False), or patch, which freezes it"
            )
        formed = self._formed
        if torch.compiler.is_compiling():  # which sees no versions
            return quantise(weight) if formed is None else formed.codes
        if formed is None or formed.weight is not weight or formed.state != _state(weight):
            formed = self.refresh(weight)
        if formed is None:
            raise RuntimeError("base_dtype='fp8': the weight is sharded over processes (FSDP)")
        return formed.codes

    def refresh(self, weight: Tensor) -> Formed | None:
        """Form them of ``weight`` as it is now; none where this process holds a part of it."""
        with torch.no_grad():
            codes = None if is_sharded(weight) else quantise(weight)
        self._formed = None if codes is None else Formed(weight, _state(weight), codes)
        return self._formed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _state(weight: Tensor) -> tuple[Any, ...]:
    version = None if weight.is_inference() else weight._version
    return version, 0 if weight.is_meta else weight.data_ptr(), weight.dtype, weight.device


def weight_error(weight: Tensor) -> float:
    """|w^ - w| / |w| of weight [N, K], in the Frobenius norm; NaN on the meta device."""
    if weight.is_meta:
        return float("nan")
    wide = weight.detach().to(torch.float32)
    norm = torch.linalg.vector_norm(wide)
    moved = torch.linalg.vector_norm(quantise(weight).widened(torch.float32) - wide)
    return float(moved / norm) if norm > 0 else 0.0


# Whether a checkpoint that is being loaded has adapters anywhere: if none, it loads strictly.
#
# While a state dict is loaded a module sees its own keys alone, and the list of missing keys, which
# is one for the whole of a load. So modules that find none of their adapters' keys are forgiven
# until one is found somewhere; then they are missing after all.


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
