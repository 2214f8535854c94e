"""The ledger behind the counts: which operation of a graph keeps which tensor for backward.

The graph itself is asked, from its outputs back: torch's own nodes name what they saved, of a
program's the call that made it is known. A storage is booked once, on the first that is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from fused_lora.bench.table import aligned
from fused_lora.programs.describe import saved_names

PREFIX = "_saved_"


@dataclass(frozen=True)
class Entry:
    """One tensor that one operation keeps."""

    op: str  # the autograd node
    tensor: str  # what it calls it
    shape: tuple[int, ...]
    dtype: str
    nbytes: int  # of its storage; 0 where another entry, or the model, holds that already
    held_by: str = ""  # who does


def ledger(y: Tensor, living: Iterable[Tensor] = (), model: nn.Module | None = None) -> list[Entry]:
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
        entries.append(Entry(op, name, shape, dtype, 0 if holder else storage.nbytes(), holder))
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


def text(entries: Iterable[Entry], tokens: int, everything: bool = False) -> str:
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
