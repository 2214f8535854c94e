"""The yardstick rule (DESIGN.md section 3).

    error(ours) <= FACTOR x error(plain torch in the same dtype) + one rounding band

Errors are relative to the float64 truth. The rule holds in the Frobenius norm, and for the worst
element, where an error is relative to the element or, if that is larger, to the root mean square of
all: in 16 bits one wrong element among thousands is nothing to the norm. The band is the dtype's
epsilon: what one rounding of every element may cost where plain torch happens to make none.

One run of plain torch may be lucky. Where few sums decide, its error is the worst of several runs
that add in other orders, as ``in_every_order`` makes them on any machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 2.0
ACCUMULATED = 8.0  # epsilons of an accumulator by which one sum among thousands may be unlucky
ROUNDED = 4.0  # bands of an element whose products round both operands, h on the way among them
LEAST = 1e-300  # of what an error is divided by

T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """One comparison: two errors and the budget they make."""

    name: str
    ours: float
    plain: float
    budget: float

    @property
    def passed(self) -> bool:
        """Whether ours is within budget; NaN never is."""
        return self.ours <= self.budget

    @property
    def share(self) -> float:
        """The part of the budget that is taken; infinite for NaN."""
        return self.ours / self.budget if self.ours == self.ours else float("inf")

    def __str__(self) -> str:
        word = "within" if self.passed else "over"
        return f"{self.name}: {self.ours:.3e} is {word} {self.budget:.3e} (plain {self.plain:.3e})"


def error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """Relative Frobenius error of ``value`` against ``truth``; 0 for two empty tensors.

    ``floor`` is the norm below which a truth is rounding noise; errors are relative to it then.
    """
    if value.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(value.double() - truth.double())
    size = torch.linalg.vector_norm(truth.double()).clamp_min(max(floor, LEAST))
    return float(difference / size)


def worst_element(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """The largest error of an element, relative to it or to the root mean square of all."""
    if truth.numel() == 0:
        return 0.0
    true = truth.double()
    mean = true.square().mean().sqrt().clamp_min(max(floor / true.numel() ** 0.5, LEAST))
    return float(((value.double() - true).abs() / true.abs().maximum(mean)).max())


def judge(
    name: str,
    ours: Tensor,
    plain: Tensor | Sequence[Tensor],
    truth: Tensor,
    dtype: torch.dtype,
    band: float | None = None,
    floor: float = 0.0,
) -> Comparison:
    """The verdict on ``ours``, computed in ``dtype``, beside ``plain``, computed likewise.

    Of the norm and of the worst element, the one that takes more of its budget.

    Args:
        name: what is compared.
        ours: what the library computed.
        plain: what plain torch computed, once or in several orders of summation.
        truth: what float64 computed.
        dtype: of ours and of plain.
        band: stands for the dtype's epsilon where products round more than the dtype does.
        floor: the norm below which ``truth`` is rounding noise.
    """
    runs = [plain] if isinstance(plain, Tensor) else list(plain)
    own = torch.finfo(dtype).eps
    bands = (own, own) if band is None else (band, ROUNDED * band)
    theirs = max(error(run, truth, floor) for run in runs)
    whole = Comparison(name, error(ours, truth, floor), theirs, FACTOR * theirs + bands[0])
    if dtype is torch.float64:  # where the truth is no truer than a run, whose elements are luck
        return whole
    theirs = max(worst_element(run, truth, floor) for run in runs)
    sums = torch.finfo(dtype if dtype.itemsize >= 4 else torch.float32).eps
    budget = FACTOR * theirs + bands[1] + ACCUMULATED * sums
    mine = worst_element(ours, truth, floor)
    return worst([whole, Comparison(f"the worst element of {name}", mine, theirs, budget)])


def judge_all(
    ours: Mapping[str, Tensor] | Sequence[Tensor],
    plain: Sequence[Mapping[str, Tensor] | Sequence[Tensor]],
    truth: Mapping[str, Tensor] | Sequence[Tensor],
    dtype: torch.dtype,
    band: float | None = None,
) -> Comparison:
    """The worst verdict on several quantities, by name or in order; ``plain`` is several runs."""
    mine, right, runs = _named(ours), _named(truth), [_named(run) for run in plain]
    assert all(mine.keys() <= other.keys() for other in (right, *runs)), (mine.keys(), right.keys())
    return worst(
        judge(name, value, [run[name] for run in runs], right[name], dtype, band)
        for name, value in mine.items()
    )


def _named(values: Mapping[str, Tensor] | Sequence[Tensor]) -> Mapping[str, Tensor]:
    if isinstance(values, Mapping):
        return values
    return {f"quantity {i}": value for i, value in enumerate(values)}


def worst(verdicts: Iterable[Comparison]) -> Comparison:
    """The one that takes most of its budget."""
    return max(verdicts, key=lambda verdict: verdict.share)


def in_every_order(compute: Callable[[], T]) -> list[T]:
    """What ``compute`` gives as it is, with sums of products backwards, and every other one first.

    Each run draws the same random numbers. A product reads the same operands, so that only the
    order of its sum differs: an order that some processor, thread count or batch would take.
    """
    state, found = torch.get_rng_state(), []
    orders: tuple[AbstractContextManager[object], ...] = (
        contextlib.nullcontext(),
        _Reordered(_backwards),
        _Reordered(_every_other_first),
    )
    for order in orders:
        torch.set_rng_state(state)
        with order:
            found.append(compute())
    return found


def _backwards(count: int) -> Tensor:
    return torch.arange(count).flip(0)


def _every_other_first(count: int) -> Tensor:
    every = torch.arange(count)
    return torch.cat((every[::2], every[1::2]))


_aten = torch.ops.aten
_PRODUCTS = {  # operation: where its factors are
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.addmm_.default: 1,
    _aten.baddbmm_.default: 1,
}
_CONVOLUTION = _aten.convolution.default
_OF_PRODUCTS = (_aten.linear.default, _aten.matmul.default, _aten.einsum.default)


class _Reordered(TorchDispatchMode):
    """Every matrix product sums over its inner dimension in another order, and convolutions."""

    def __init__(self, order: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.order = order

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping would import torch's compiler, seconds of a first use

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_PRODUCTS:  # where no autograd has taken them apart
            with self:
                return func.decompose(*args, **kwargs)
        if (at := _PRODUCTS.get(func)) is not None:
            left, right = args[at], args[at + 1]
            index = self.order(left.shape[-1]).to(left.device)
            left, right = left.index_select(-1, index), right.index_select(-2, index)
            args = (*args[:at], left, right, *args[at + 2 :])
        elif func is _CONVOLUTION and not args[6] and args[8] == 1:  # of one group, forward
            index = self.order(args[0].shape[1]).to(args[0].device)
            args = (*(t.index_select(1, index) for t in args[:2]), *args[2:])
        return func(*args, **kwargs)
