"""Who computes with whose adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from fused_lora.types import Span

if TYPE_CHECKING:
    from fused_lora.nn.adapted import AdaptedLinear


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
