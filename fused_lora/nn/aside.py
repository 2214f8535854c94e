"""Gradients of parts, put aside until every use of their parameter has had its backward.

The engine names each backward pass by a number and frees the pass's callbacks when it ends or
fails; the accounts of a pass hang on one such callback, and are found by the number.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fused_lora.nn.box import Box


class Account:
    """The gradient of one parameter in one backward pass, as far as it has come."""

    def __init__(self) -> None:
        self.parts: dict[Box, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None  # where the parts were last worked on

    def add(self, box: Box, grad: Tensor) -> None:
        """Add ``grad`` [box] in place; it belongs to the account from here on."""
        self.follow(grad)
        if (part := self.parts.get(box)) is not None:
            part.add_(grad)
            return
        for held, part in self.parts.items():
            if held.holds(box):
                held.place_of(box, part).add_(grad)
                return
        for held in [held for held in self.parts if box.holds(held)]:
            box.place_of(held, grad).add_(self.parts.pop(held))
        self.parts[box] = grad

    def pour(self, whole: Tensor) -> Tensor:
        """Add every part to ``whole``, in place."""
        self.follow(whole)
        for box, part in self.parts.items():
            box.of(whole).add_(part)
        return whole

    def follow(self, grad: Tensor) -> None:
        """Wait for what ran on another stream: the engine waits for what comes by an edge alone."""
        if not grad.is_cuda:
            return
        now = torch.cuda.current_stream(grad.device)
        if self.stream is not None and self.stream != now:
            now.wait_stream(self.stream)
            for part in self.parts.values():
                part.record_stream(now)
        self.stream = now


class Pass:
    """The accounts of one backward pass."""

    def __init__(self) -> None:
        self.accounts: dict[Ledger, Account] = {}

    def close(self) -> None:
        """What no hook has asked for is not wanted: the parameter is no input of the pass."""
        self.accounts.clear()


class Ledger:
    """A parameter's hook, and the zero that its edge is handed; it lives as long as the hook."""

    def __init__(self, owner: Tensor) -> None:
        self.owner = weakref.ref(owner)
        self.zero = _zero(owner)
        if (hooks := owner._backward_hooks) is not None:  # swapped since: torch has lost them
            owner._backward_hooks = None
            owner._backward_hooks = hooks
        self.hook = owner.register_hook(self.settle)

    def settle(self, grad: Tensor | None) -> Tensor | None:
        """The hook: the zero that arrives, replaced by the account's sum."""
        running = _passes.get(torch._C._current_graph_task_id())
        account = running.accounts.pop(self, None) if running is not None else None
        owner = self.owner()
        if owner is None or grad is None or account is None:
            return None
        if grad.data_ptr() != self.zero.data_ptr():  # someone else's gradient, added to the zero
            return account.pour(grad)
        account.follow(grad)
        if (whole := account.parts.get(Box.all_of(owner))) is not None:
            return whole
        if owner.grad is not None and _accumulates(owner):
            account.pour(owner.grad)
            return None
        return account.pour(torch.zeros_like(owner))


_passes: weakref.WeakValueDictionary[int, Pass] = weakref.WeakValueDictionary()
_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()  # by owner's id
_lock = Lock()  # each device has its own engine thread


def put_aside(
    owners: Sequence[Tensor], boxes: Sequence[Box], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Add each gradient to its owner's account, the last first, as the engine would.

    Per owner comes back what its edge is handed: the zero, once in a pass.
    """
    handed: list[Tensor | None] = [None] * len(grads)
    with _lock:
        accounts = _current_pass().accounts
        for i in reversed(range(len(grads))):
            if (grad := grads[i]) is None:
                continue
            ledger = _ledger(owners[i])
            if (account := accounts.get(ledger)) is None:
                account = accounts[ledger] = Account()
                handed[i] = ledger.zero
            account.add(boxes[i], grad)
    return handed


def _current_pass() -> Pass:
    number = torch._C._current_graph_task_id()
    found = _passes.get(number)
    if found is None:
        found = _passes[number] = Pass()
        torch.autograd.Variable._execution_engine.queue_callback(found.close)  # type: ignore
    return found


def _ledger(owner: Tensor) -> Ledger:
    found = _ledgers.get(id(owner))
    if found is None or found.owner() is not owner:
        found = _ledgers[id(owner)] = Ledger(owner)
    zero = found.zero
    if (zero.dtype, zero.device, zero.shape) != (owner.dtype, owner.device, owner.shape):
        found.zero = _zero(owner)  # it was moved
    return found


def let_go(owner: Tensor) -> None:
    """Forget ``owner`` until its next backward: no weak reference may be there in a swap."""
    with _lock:
        if (found := _ledgers.pop(id(owner), None)) is not None and found.owner() is owner:
            found.hook.remove()


def _zero(owner: Tensor) -> Tensor:
    return owner.detach().new_zeros(()).expand(owner.shape)


def _accumulates(owner: Tensor) -> bool:
    """Whether this pass adds to ``owner.grad``, rather than handing the gradient out."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(owner).node)
    except RuntimeError:  # torch.autograd.grad: the engine does not say
        return False
