"""A stage: one step of a chain whose backward is written out.

The tensors between stages are boundaries: boundary i goes into stage i, boundary i + 1 comes out
of it. A stage says whether its backward reads what went in; the chain decides whether that is kept
or made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fused_lora.kernels.interface import Adapters, Ending, Slope
from fused_lora.types import Plan

Tensors = tuple[Tensor, ...]
Optional = tuple[Tensor | None, ...]


class Asked(NamedTuple):
    """Which gradients a stage is asked for."""

    x: bool  # of what goes in
    own: tuple[bool, ...]  # of its operands
    any: bool  # of either
    note: Any  # the same in the stage's own words


class Run(NamedTuple):
    """What one forward of a stage gave."""

    out: Tensors
    extra: Optional = ()  # tensors that its backward reads beside its input and its operands
    note: Any = None  # what else its backward must know, no tensor in it
    beyond: Tensor | None = None  # act(out), where the place's ending is an activation
    h: Tensor | None = None  # [M, sum R] of out, for the stage behind


class Room(NamedTuple):
    """What a stage does for the next: writes where its one GEMM reads, and forms its h."""

    buffer: Tensor | None  # [M, K + sum R]
    columns: int  # K
    plan: Plan  # of the stage that reads it
    adapters: Adapters | None = None  # whose h is to be formed
    h: Tensor | None = None  # [M, sum R], once it is; the right of the buffer where there is one

    @property
    def left(self) -> Tensor | None:
        """[M, K], what is written."""
        return None if self.buffer is None else self.buffer[:, : self.columns]

    @property
    def right(self) -> Tensor | None:
        """[M, sum R], where h goes."""
        return None if self.buffer is None else self.buffer[:, self.columns :]


class Place(NamedTuple):
    """Where a stage finds and leaves what it computes with, where it asked for that."""

    out: Tensor | None = None  # [M, N], written by a stage that places, or for its ending
    room: Room | None = None  # holds x
    ending: Ending | None = None  # computed behind its y
    plan: Plan | None = None  # by which it computes an activation as its ending
    makes: Room | None = None  # of the stage behind, whose h it forms as well


FREE = Place()


def consecutive(lengths: Iterable[int]) -> tuple[slice, ...]:
    """Slices one behind another."""
    found, first = [], 0
    for length in lengths:
        found.append(slice(first, first + length))
        first += length
    return tuple(found)


class Stage:
    """The base of all stages; they are frozen dataclasses that hold no tensor."""

    operands = 0  # how many tensors it owns: weights and adapters
    seeds: tuple[int, ...] = ()  # which of them are drawn anew for each call
    gelu: str | None = None  # erf or tanh, where it is that and nothing else

    def forward(self, x: Tensors, own: Optional, asked: Asked, place: Place = FREE) -> Run:
        """One pass, as ``place`` has it."""
        raise NotImplementedError(type(self).__name__)

    def backward(
        self, dy: Tensors, x: Tensors | None, run: Run, own: Optional, asked: Asked
    ) -> tuple[Tensors | None, Optional]:
        """Gradients of what went in and of the operands; ``run`` comes without its ``out``."""
        raise NotImplementedError(type(self).__name__)

    def fuses(
        self, ending: Ending, x: Tensors, own: Optional, asked: Asked, room: Room | None
    ) -> Plan | None:
        """The plan by which it computes the activation behind it in its own pass; or None."""
        return None

    def joins(self, asked: Asked) -> bool:
        """Whether it adds a gradient that passed by to that of what went in, in its own pass."""
        return False

    def joined(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: Run,
        own: Optional,
        asked: Asked,
        beside: Tensor | None,
    ) -> tuple[Tensors | None, Optional]:
        """As ``backward``, with ``beside`` [M, K] added to dx; where it ``joins``."""
        raise NotImplementedError(type(self).__name__)

    def slopes(self, dy: Tensors, run: Run, own: Optional) -> bool:
        """Whether its dx goes through the slope of the activation before it in its own pass."""
        return False

    def sloped(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: Run,
        own: Optional,
        asked: Asked,
        slope: Slope,
    ) -> tuple[Tensors | None, Optional]:
        """As ``backward``, with the gradient of u where x = act(u); where it ``slopes``."""
        raise NotImplementedError(type(self).__name__)

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """The same from operations that autograd and the compiler know."""
        raise NotImplementedError(type(self).__name__)

    def ending(
        self, residual: Tensor | None, gamma: Tensor | None, mask: Tensor | None
    ) -> Ending | None:
        """What of residual + gamma mask z it computes as it forms z, as the last stage; or None."""
        return None

    def asked(self, x: bool, own: tuple[bool, ...]) -> Any:
        """The note of ``Asked``."""
        return None

    def places(self, x: Tensors) -> bool:
        """Whether forward writes the one tensor that comes out where it is told, at no cost."""
        return False

    def shrinks(self, x: Tensors, own: Optional, adapters: Adapters) -> bool:
        """Whether forward forms h of the one tensor that comes out, in its own pass."""
        return False

    def room(
        self,
        like: Tensor,
        own: Optional,
        asked: Asked,
        writes: bool,  # whoever makes x does so where it is told
        shrinks: Callable[[Adapters], bool],  # and forms h
    ) -> Room | None:
        """What it wants of that, x being of as many rows as ``like`` and beside it."""
        return None

    def reads_input(self, run: Run, asked: Asked) -> bool:
        """Whether backward reads what went in."""
        return True

    def slim(self, run: Run, asked: Asked) -> Run:
        """The same run with what can be made again cheaply left out."""
        return run
