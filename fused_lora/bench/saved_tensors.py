"""What a step keeps for its backward, and the names of what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora.bench.clock import Step
from fused_lora.bench.table import aligned
from fused_lora.programs.describe import saved_names

OUTSIDE = "outside"  # the section of what no listed block keeps


class SavedBytes:
    """Counts the unique storages that autograd saves inside a ``with`` block.

    Views of one storage count once. The parameters and buffers of ``model``, and the tensors in
    ``excluded`` (the input of the step), live on anyway and do not count.

    Attributes:
        by_section: Bytes by section: the index of the block that first saved the storage.
        fp32_by_section: The part of them in storages first saved as fp32.
        weights_by_section: The part of them that are casts or merges of a parameter, by shape.
    """

    def __init__(
        self,
        model: nn.Module,
        excluded: Iterable[Tensor] = (),
        sections: Iterable[nn.Module] = (),
    ) -> None:
        free = chain(model.parameters(), model.buffers(), excluded)
        self._seen = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in free}
        self._sections = list(sections)
        self._now = OUTSIDE
        self.by_section: Counter[str] = Counter()
        self.fp32_by_section: Counter[str] = Counter()
        self.weights_by_section: Counter[str] = Counter()
        matrices = [p.shape for p in model.parameters() if p.ndim == 2]
        self._shapes = {*matrices, *(shape[::-1] for shape in matrices)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.by_section.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = storage  # held, so that its address stays taken
            self._count(tensor, storage.nbytes())
        return tensor

    def _count(self, tensor: Tensor, nbytes: int) -> None:
        self.by_section[self._now] += nbytes
        if tensor.dtype is torch.float32:
            self.fp32_by_section[self._now] += nbytes
        if tensor.shape in self._shapes:
            self.weights_by_section[self._now] += nbytes

    def _enter(self, index: int) -> None:
        self._now = str(index)

    def _leave(self) -> None:
        self._now = OUTSIDE

    def __enter__(self) -> SavedBytes:
        self._handles = []
        for i, block in enumerate(self._sections):
            self._handles += [
                block.register_forward_pre_hook(lambda m, a, i=i: self._enter(i)),
                block.register_forward_hook(lambda m, a, o: self._leave()),
            ]
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._seen.clear()


class WideCopies(TorchDispatchMode):
    """Counts fp32 copies of 16-bit activations: what fp32 adapters cost when x is cast to them.

    Attributes:
        count: Copies seen.
        nbytes: Bytes of all of them together.
    """

    def __init__(self, min_elements: int) -> None:
        super().__init__()
        self.min_elements = min_elements  # smaller tensors are weights of adapters, not x
        self.count = self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``; count it when it is a widening copy."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype is torch.float32:
            narrow = args[0].dtype in (torch.bfloat16, torch.float16)
            if narrow and out.numel() >= self.min_elements:
                self.count += 1
                self.nbytes += out.nbytes
        return out


def step_peak_bytes(step: Step, device: str) -> int | None:
    """Peak bytes one call of ``step`` allocates beyond what was there; None, uncalled, off CUDA."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# The saved_tensors behind the counts: which operation of a graph keeps which tensor for backward.
#
# The graph itself is asked, from its outputs back: torch's own nodes name what they saved, of a
# program's the call that made it is known. A storage is booked once, on the first that is met.


PREFIX = "_saved_"


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that one operation keeps."""

    op: str  # the autograd node
    tensor: str  # what it calls it
    shape: tuple[int, ...]
    dtype: str
    nbytes: int  # of its storage; 0 where another one, or the model, holds that already
    held_by: str = ""  # who does


def saved_tensors(
    y: Tensor, living: Iterable[Tensor] = (), model: nn.Module | None = None
) -> list[SavedTensor]:
    """Every tensor kept for the backward of ``y``.

    Args:
        y: what a forward gave, its graph not yet freed.
        living: tensors that live on anyway, such as the input of the step.
        model: its parameters and buffers live on anyway.
    """
    own = chain(model.parameters(), model.buffers()) if model else ()
    holders = {t.untyped_storage().data_ptr(): "the model" for t in own}
    holders |= {t.untyped_storage().data_ptr(): "the caller" for t in living}
    entries = []
    for op, name, tensor in _saved(y):
        storage = tensor.untyped_storage()
        holder = holders.get(storage.data_ptr(), "")
        holders.setdefault(storage.data_ptr(), f"{op} {name}")
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        entries.append(
            SavedTensor(op, name, shape, dtype, 0 if holder else storage.nbytes(), holder)
        )
    return entries


def _saved(y: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """(node, name, tensor) of everything saved, the outputs' side first."""
    seen: set[Any] = set()
    ahead = [y.grad_fn]
    while ahead:
        node = ahead.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from ((node.name(), name, tensor) for name, tensor in _of(node))
        ahead += [following for following, _ in node.next_functions]


def _of(node: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, BackwardCFunction):
        tensors = node.saved_tensors
        program = getattr(node, "program", None)
        names = saved_names(program) if program else [str(i) for i in range(len(tensors))]
        yield from ((n, t) for n, t in zip(names, tensors, strict=True) if t is not None)
        return
    for name in dir(node):
        if name.startswith(PREFIX):
            value = getattr(node, name)
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, Tensor):
                    yield name.removeprefix(PREFIX), part


def text(entries: Iterable[SavedTensor], tokens: int, everything: bool = False) -> str:
    """A table, largest first, with its sum; what is held already is left out unless asked for."""
    entries = sorted(entries, key=lambda entry: -entry.nbytes)
    shown = [entry for entry in entries if everything or entry.nbytes]
    body = [
        (
            entry.op,
            entry.tensor,
            str(list(entry.shape)),
            entry.dtype,
            f"{entry.nbytes / tokens:,.1f}" if entry.nbytes else f"held by {entry.held_by}",
        )
        for entry in shown
    ]
    total = sum(entry.nbytes for entry in entries)
    heads = ("operation", "tensor", "shape", "dtype", "bytes per token")
    return "\n".join(aligned([heads, *body, ("in all", "", "", "", f"{total / tokens:,.1f}")]))
