"""What a forward does with the weights under watch: who reads them, how y is taken apart.

Labels travel beside y: the number of its column at every element, through each view the attention
makes of it, until fewer columns than all are together. That is how the model itself says which
columns are q, k and v, and whether heads come first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

VIEWS = frozenset({
    "reshape", "view", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis",
    "unbind", "chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk",
    "unsafe_split", "unflatten", "flatten", "__getitem__", "select", "narrow", "squeeze",
    "unsqueeze", "contiguous", "clone",
})  # fmt: skip
Columns = tuple[tuple[int, int], ...]  # ranges [start, stop) of y


@dataclass
class Sight:
    """What one forward showed of one weight."""

    rows: int = 0  # of x, in the largest use
    called: bool = False  # by its module's own forward
    read: bool = False  # by anybody else
    given: Any = None  # what its module was called with, the tensor itself
    width: int = 0  # columns of y, once labelled
    parts: list[Tensor] = field(default_factory=list)  # columns found together, as y came apart

    @property
    def columns(self) -> Columns:
        """The ranges that y was taken apart into; empty where they are no ranges."""
        ranges = {(int(p[0]), int(p[-1]) + 1) for p in self.parts if p[-1] - p[0] + 1 == len(p)}
        return tuple(sorted(ranges)) if len(ranges) == len(self.parts) else ()


class Watch(TorchFunctionMode):
    """Notes every use of some weights while it is in force."""

    def __init__(self, sights: Mapping[int, Sight], labelled: Iterable[int]) -> None:
        """``sights`` by the id of the weight's tensor; ``labelled`` are those of them to label."""
        super().__init__()
        self._sights = sights
        self._labelled = set(labelled)
        self._inside: set[int] = set()  # weights whose own module is running
        self._labels: dict[int, tuple[Tensor, Tensor, Sight]] = {}  # tensor kept, labels, of whom

    def inside(self, weight: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks that tell when the module of ``weight`` runs."""

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._inside.add(weight)
            self._sights[weight].called = True
            self._sights[weight].given = args[0] if args else None

        return enter, lambda *_: self._inside.discard(weight)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, and note what it says of the weights."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # else it asks a shape
            for tensor in tensors:
                if id(tensor) in self._sights:
                    self._note(id(tensor), tensors[0], result)
            self._follow(func, args, kwargs, tensors, result)
        return result

    def _note(self, weight: int, x: Tensor, result: Any) -> None:
        sight = self._sights[weight]
        sight.read |= weight not in self._inside
        if id(x) not in self._sights:
            sight.rows = max(sight.rows, math.prod(x.shape[:-1]))
        first = weight in self._labelled and not sight.width
        if first and isinstance(result, Tensor) and id(x) not in self._sights:
            sight.width = result.shape[-1]
            labels = torch.arange(sight.width, dtype=torch.int32, device="cpu")
            self._labels[id(result)] = (result, labels.expand(result.shape), sight)

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        result: Any,
    ) -> None:
        sources = [t for t in tensors if id(t) in self._labels]
        if not sources or id(result) in self._labels:
            return
        (source, labels, sight) = self._labels[id(sources[0])]
        if getattr(func, "__name__", "") in VIEWS:
            args, kwargs = tree_map(lambda e: labels if e is source else e, (args, kwargs))
            moved = func(*args, **kwargs)
            for out, each in zip(tree_leaves(result), tree_leaves(moved), strict=True):
                self._settle(out, each, sight)
        elif isinstance(result, Tensor) and result.shape == source.shape:
            self._labels[id(result)] = (result, labels, sight)  # a bias, a norm, a cast

    def _settle(self, out: Tensor, labels: Tensor, sight: Sight) -> None:
        present = torch.zeros(sight.width, dtype=torch.bool, device="cpu")
        present[labels.reshape(-1).long()] = True
        columns = present.nonzero().view(-1)
        if len(columns) == sight.width:
            self._labels[id(out)] = (out, labels, sight)
        elif len(columns):
            sight.parts.append(columns)
