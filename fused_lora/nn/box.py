"""Which part of a parameter a module computes with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
