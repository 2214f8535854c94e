"""Slices of parameters as operands, their gradients added in the parameter's, and who shares whose.

    autograd           dA = dA_t + pad(dA_s)              pad: a zero-filled tensor of A's size
    parameter_slices   dA = dA_t,  dA[:R, :K_s] += dA_s   one kernel, in autograd's order

A slice's backward adds its gradient to an accumulator of the running backward pass, and hands the
parameter's edge a stride-0 zero: it costs no memory and keeps the edge alive. When all uses have
run, a hook on the parameter replaces that zero by the sum. So ``.grad``, ``torch.autograd.grad``,
accumulation over passes and DDP see what they always see. Accumulators belong to the pass: they are
gone when it ends, by an exception too.

Hooks that a user put on the parameter itself (``Tensor.register_hook``) before its first shared
backward see the zero instead of the gradient; ``register_post_accumulate_grad_hook`` sees it
whole. Under ``torch.compile`` and ``torch.func``, and where the parameter is no leaf, slices are
autograd's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fused_lora.programs.run import refuse_double_backward, transformed
from fused_lora.types import Span

if TYPE_CHECKING:
    from fused_lora.nn.adapted import AdaptedLinear


class ParameterSlice(NamedTuple):
    """Rows [top, bottom) and columns [0, right) of an a [R, K] or a b [N, R]."""

    top: int
    bottom: int
    right: int

    @classmethod
    def all_of(cls, whole: Tensor) -> ParameterSlice:
        """The slice that leaves nothing out."""
        return cls(0, *whole.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The view [bottom - top, right] of ``whole``."""
        rows, columns = whole.shape
        if self.bottom - self.top != rows:
            whole = whole.narrow(0, self.top, self.bottom - self.top)
        return whole if self.right == columns else whole.narrow(1, 0, self.right)

    def contains(self, other: ParameterSlice) -> bool:
        """Whether ``other`` lies inside."""
        rows = self.top <= other.top and other.bottom <= self.bottom
        return rows and other.right <= self.right

    def view_of(self, other: ParameterSlice, values: Tensor) -> Tensor:
        """The view of ``values``, which are this slice's, where ``other`` lies in it."""
        return ParameterSlice(other.top - self.top, other.bottom - self.top, other.right).of(values)


class SliceGradAccumulator:
    """The gradient of one parameter in one backward pass, as far as it has come."""

    def __init__(self) -> None:
        self.sums: dict[ParameterSlice, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None  # where the sums were last worked on

    def add(self, where: ParameterSlice, grad: Tensor) -> None:
        """Add ``grad`` at ``where``; it may be written from here on."""
        self.wait_for_stream(grad)
        if (total := self.sums.get(where)) is not None:
            total.add_(grad)
            return
        for held, total in self.sums.items():
            if held.contains(where):
                held.view_of(where, total).add_(grad)
                return
        for held in [held for held in self.sums if where.contains(held)]:
            where.view_of(held, grad).add_(self.sums.pop(held))
        self.sums[where] = grad

    def add_to(self, whole: Tensor) -> Tensor:
        """Add every sum to ``whole``, in place."""
        self.wait_for_stream(whole)
        for where, total in self.sums.items():
            where.of(whole).add_(total)
        return whole

    def wait_for_stream(self, grad: Tensor) -> None:
        """Wait for what ran on another stream: the engine waits for what comes by an edge alone."""
        if not grad.is_cuda:
            return
        now = torch.cuda.current_stream(grad.device)
        if self.stream is not None and self.stream != now:
            now.wait_stream(self.stream)
            for total in self.sums.values():
                total.record_stream(now)
        self.stream = now


class BackwardPass:
    """The accumulators of one backward pass.

    The engine names each pass by a number and frees its callbacks when it ends or fails; this
    object is held by such a callback alone, and found by the number.
    """

    def __init__(self) -> None:
        self.accumulators: dict[OwnerHook, SliceGradAccumulator] = {}

    def close(self) -> None:
        """What no hook has asked for is not wanted: the parameter is no input of the pass."""
        self.accumulators.clear()


class OwnerHook:
    """The hook on a parameter whose slices are used, and the zero that its edge is handed."""

    def __init__(self, owner: Tensor) -> None:
        self.owner = weakref.ref(owner)
        self.zero = _zero(owner)
        if (hooks := owner._backward_hooks) is not None:  # swapped since: torch has lost them
            owner._backward_hooks = None
            owner._backward_hooks = hooks
        self.handle = owner.register_hook(self.replace_zero)

    def replace_zero(self, grad: Tensor | None) -> Tensor | None:
        """The hook itself: the sum in place of the zero that arrives."""
        running = _passes.get(torch._C._current_graph_task_id())
        found = running.accumulators.pop(self, None) if running is not None else None
        owner = self.owner()
        if owner is None or grad is None or found is None:
            return None
        if grad.data_ptr() != self.zero.data_ptr():  # another gradient, added to the zero
            return found.add_to(grad)
        found.wait_for_stream(grad)
        if (whole := found.sums.get(ParameterSlice.all_of(owner))) is not None:
            return whole
        if owner.grad is not None and _accumulates(owner):
            found.add_to(owner.grad)
            return None
        return found.add_to(torch.zeros_like(owner))


_passes: weakref.WeakValueDictionary[int, BackwardPass] = weakref.WeakValueDictionary()
_hooks: weakref.WeakValueDictionary[int, OwnerHook] = weakref.WeakValueDictionary()  # by owner's id
_lock = Lock()  # each device has its own engine thread


def accumulate(
    owners: Sequence[Tensor], slices: Sequence[ParameterSlice], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Add each gradient to its owner's accumulator, the last first, as the engine would.

    Per owner comes back what its edge is handed: the zero, once in a pass.
    """
    handed: list[Tensor | None] = [None] * len(grads)
    with _lock:
        accumulators = _current_pass().accumulators
        for i in reversed(range(len(grads))):
            if (grad := grads[i]) is None:
                continue
            hook = _hook_of(owners[i])
            if (found := accumulators.get(hook)) is None:
                found = accumulators[hook] = SliceGradAccumulator()
                handed[i] = hook.zero
            found.add(slices[i], grad)
    return handed


def _current_pass() -> BackwardPass:
    number = torch._C._current_graph_task_id()
    found = _passes.get(number)
    if found is None:
        found = _passes[number] = BackwardPass()
        torch.autograd.Variable._execution_engine.queue_callback(found.close)  # type: ignore
    return found


def _hook_of(owner: Tensor) -> OwnerHook:
    found = _hooks.get(id(owner))
    if found is None or found.owner() is not owner:
        found = _hooks[id(owner)] = OwnerHook(owner)
    zero = found.zero
    if (zero.dtype, zero.device, zero.shape) != (owner.dtype, owner.device, owner.shape):
        found.zero = _zero(owner)  # it was moved
    return found


def remove_hook(owner: Tensor) -> None:
    """Unhook ``owner`` until its next backward: no weak reference may be there in a swap."""
    with _lock:
        if (found := _hooks.pop(id(owner), None)) is not None and found.owner() is owner:
            found.handle.remove()


def _zero(owner: Tensor) -> Tensor:
    return owner.detach().new_zeros(()).expand(owner.shape)


def _accumulates(owner: Tensor) -> bool:
    """Whether this pass adds to ``owner.grad``, rather than handing the gradient out."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(owner).node)
    except RuntimeError:  # torch.autograd.grad: the engine does not say
        return False


def parameter_slices(owners: Sequence[Tensor], slices: Sequence[ParameterSlice]) -> list[Tensor]:
    """One view per (owner, slice); an owner may come several times.

    Raises:
        TypeError: an owner that is sharded over devices, of which no slice can be had.
    """
    ours = [i for i, owner in enumerate(owners) if accumulates_slices(owner)]
    if len(ours) == len(owners):
        return list(_ParameterSlices.apply(slices, *owners))
    views = [each.of(owner) for owner, each in zip(owners, slices, strict=True)]
    if ours:
        found = _ParameterSlices.apply([slices[i] for i in ours], *(owners[i] for i in ours))
        for i, view in zip(ours, found, strict=True):
            views[i] = view
    return views


def accumulates_slices(owner: Tensor) -> bool:
    """Whether gradients of slices of ``owner`` are accumulated here; else by autograd's slices."""
    if type(owner) is not nn.Parameter and hasattr(owner, "device_mesh"):
        raise TypeError(
            f"a {type(owner).__name__} {tuple(owner.shape)} is sharded over {owner.device_mesh}: "
            "parts of it cannot be shared; keep adapters unsharded"
        )
    trains = owner.requires_grad and owner.is_leaf and torch.is_grad_enabled()
    return trains and not (torch.compiler.is_compiling() or transformed())


class _ParameterSlices(torch.autograd.Function):
    """Views out; their gradients into the accumulators of the owners."""

    @staticmethod
    def forward(ctx: Any, slices: list[ParameterSlice], *owners: Tensor) -> tuple[Tensor, ...]:
        """One view per owner."""
        ctx.slices, ctx.owners = slices, owners
        ctx.set_materialize_grads(False)
        return tuple(each.of(owner) for each, owner in zip(slices, owners, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Per owner: the zero that stands for all of its slices, once per pass."""
        refuse_double_backward()
        return None, *accumulate(ctx.owners, ctx.slices, grads)


@dataclass(frozen=True)
class SharedAdapter:
    """What one group of a sharer computes with: a[:R] and b[first : first + columns, :R]."""

    owner: AdaptedLinear
    group: str  # the owner's
    first: int  # row of the owner's b where the sharer's first column is
    span: Span  # the sharer's columns of its y, and its rank


_sharers: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def add_sharer(owner: nn.Module, sharer: nn.Module) -> None:
    """From now on ``sharer`` computes with slices of ``owner``'s adapters."""
    _sharers.setdefault(owner, WeakSet()).add(sharer)


def remove_sharer(owner: nn.Module, sharer: nn.Module) -> None:
    """It no longer does."""
    sharers_of(owner).discard(sharer)


def sharers_of(owner: nn.Module) -> WeakSet[nn.Module]:
    """The modules that do, as far as they were not made by copying others."""
    return _sharers.get(owner) or WeakSet()
