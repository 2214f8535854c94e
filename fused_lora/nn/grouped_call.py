"""Results that one linear of a group computed for all of it, during one forward in one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.ops.operand import compute_dtype

ComputeGroup = Callable[[Sequence[Any], Tensor], Sequence[Tensor] | None]


class _OpenCalls(threading.local):
    """The calls that are open in this thread, innermost last."""

    def __init__(self) -> None:
        self.calls: list[GroupedCall] = []


open_calls = _OpenCalls()


class GroupedCall:
    """One forward of a module that holds groups of linears given the same x."""

    def __init__(self, groups: Sequence[Sequence[nn.Module]], compute: ComputeGroup) -> None:
        """``compute`` gives the results of a group on x, or None where each computes its own."""
        self._group_of = {each: group for group in groups for each in group}
        self._compute = compute
        self._results: dict[nn.Module, tuple[Tensor, tuple[object, ...], Tensor]] = {}
        self._tried: set[nn.Module] = set()  # the first of each group that was asked for

    def result_of(self, linear: nn.Module, x: Tensor) -> Tensor | None:
        """Its y of x, computed now or before; None where it has to compute by itself."""
        group = self._group_of.get(linear, ())
        if group and group[0] not in self._tried:
            self._tried.add(group[0])
            if (ys := self._compute(group, x)) is not None:
                found = zip(group, ys, strict=True)
                self._results |= {each: (x, state_of(x), y) for each, y in found}
        if linear not in self._results:
            return None
        given, state, y = self._results.pop(linear)
        return y if given is x and state == state_of(x) else None


def grouped_result(linear: nn.Module, x: Tensor) -> Tensor | None:
    """``linear``'s y of x from the innermost call; None where it has to compute by itself."""
    if torch.compiler.is_compiling() or not open_calls.calls:
        return None
    return open_calls.calls[-1].result_of(linear, x)


def state_of(x: Tensor) -> tuple[object, ...]:
    """What must be as it was when the results were computed; x is no inference tensor."""
    return x._version, x.data_ptr(), x.requires_grad, torch.is_grad_enabled(), compute_dtype(x)
