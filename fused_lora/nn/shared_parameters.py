"""Parts of parameters as operands, their gradients added where the whole is, and who uses whose."""

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


class Box(NamedTuple):
    """Rows [top, bottom) and columns [0, right) of an a [R, K] or a b [N, R]."""

    top: int
    bottom: int
    right: int

    @classmethod
    def all_of(cls, whole: Tensor) -> Box:
        """The box that leaves nothing out."""
        return cls(0, *whole.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The view [bottom - top, right] of ``whole``."""
        rows, columns = whole.shape
        if self.bottom - self.top != rows:
            whole = whole.narrow(0, self.top, self.bottom - self.top)
        return whole if self.right == columns else whole.narrow(1, 0, self.right)

    def holds(self, other: Box) -> bool:
        """Whether ``other`` lies inside."""
        rows = self.top <= other.top and other.bottom <= self.bottom
        return rows and other.right <= self.right

    def place_of(self, other: Box, part: Tensor) -> Tensor:
        """The view of ``part``, which is this box's, where ``other`` lies in it."""
        return Box(other.top - self.top, other.bottom - self.top, other.right).of(part)


# Gradients of parts, put aside until every use of their parameter has had its backward.
#
# The engine names each backward pass by a number and frees the pass's callbacks when it ends or
# fails; the accounts of a pass hang on one such callback, and are found by the number.


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


# Parts of parameters as operands, with gradients that are never padded to the parameter's size.
#
#     autograd   dA = dA_t + pad(dA_s)                pad: a zero-filled tensor of A's size, per use
#     borrow     dA = dA_t,  dA[:R, :K_s] += dA_s     one kernel on the part, in autograd's order
#
# A part's backward puts its gradient aside, under the backward pass that runs, and hands the
# parameter's edge a stride-0 zero: it costs no memory and keeps the edge alive. When all uses have
# run, a hook on the parameter replaces that zero by the sum. So ``.grad``, ``torch.autograd.grad``,
# accumulation over passes and DDP see what they always see. What is put aside belongs to the pass:
# it is gone when the pass ends, by an exception too.
#
# Hooks that a user put on the parameter itself (``Tensor.register_hook``) before its first shared
# backward see the zero instead of the gradient; ``register_post_accumulate_grad_hook`` sees it
# whole. Under ``torch.compile`` and ``torch.func``, and where the parameter is no leaf, parts are
# autograd's own slices.


def borrow(owners: Sequence[Tensor], boxes: Sequence[Box]) -> list[Tensor]:
    """One view per (owner, box); an owner may come several times.

    Raises:
        TypeError: an owner that is sharded over devices, of which no part can be had.
    """
    lent = [i for i, owner in enumerate(owners) if lends(owner)]
    if len(lent) == len(owners):
        return list(_Borrow.apply(boxes, *owners))
    parts = [box.of(owner) for owner, box in zip(owners, boxes, strict=True)]
    if lent:
        borrowed = _Borrow.apply([boxes[i] for i in lent], *(owners[i] for i in lent))
        for i, part in zip(lent, borrowed, strict=True):
            parts[i] = part
    return parts


def lends(owner: Tensor) -> bool:
    """Whether a part of ``owner`` is to be borrowed; otherwise it is autograd's slice."""
    if type(owner) is not nn.Parameter and hasattr(owner, "device_mesh"):
        raise TypeError(
            f"a {type(owner).__name__} {tuple(owner.shape)} is sharded over {owner.device_mesh}: "
            "parts of it cannot be shared; keep adapters unsharded"
        )
    trains = owner.requires_grad and owner.is_leaf and torch.is_grad_enabled()
    return trains and not (torch.compiler.is_compiling() or transformed())


class _Borrow(torch.autograd.Function):
    """Views out; their gradients into the accounts of the owners."""

    @staticmethod
    def forward(ctx: Any, boxes: list[Box], *owners: Tensor) -> tuple[Tensor, ...]:
        """One view per owner."""
        ctx.boxes, ctx.owners = boxes, owners
        ctx.set_materialize_grads(False)
        return tuple(box.of(owner) for box, owner in zip(boxes, owners, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Per owner: the zero that stands for all of its parts, once per pass."""
        refuse_double_backward()
        return None, *put_aside(ctx.owners, ctx.boxes, grads)


@dataclass(frozen=True)
class Loan:
    """What one group of a borrower computes with: a[:R] and b[first : first + columns, :R]."""

    owner: AdaptedLinear
    group: str  # the owner's
    first: int  # row of the owner's b where the borrower's first column is
    span: Span  # the borrower's columns of its y, and its rank


_borrowers: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def note(owner: nn.Module, borrower: nn.Module) -> None:
    """From now on ``borrower`` computes with parts of ``owner``'s adapters."""
    _borrowers.setdefault(owner, WeakSet()).add(borrower)


def forget(owner: nn.Module, borrower: nn.Module) -> None:
    """It no longer does."""
    borrowers_of(owner).discard(borrower)


def borrowers_of(owner: nn.Module) -> WeakSet[nn.Module]:
    """The modules that do, as far as they were not made by copying others."""
    return _borrowers.get(owner) or WeakSet()
