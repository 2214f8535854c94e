"""A stage: one step of a chain whose backward is written out; what a chain is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.interface import (
    ActivationGrad,
    Adapters,
    Epilogue,
    InputNorm,
    LowRank,
    PreviousLinear,
)
from fused_lora.plan.problem import Problem
from fused_lora.types import NO_CONTEXT, FusionContext, Plan

# The tensors between stages are boundaries: boundary i goes into stage i, boundary i + 1 comes out
# of it. A stage says whether its backward reads what went in; the chain decides whether that is
# kept or made again.


Tensors = tuple[Tensor, ...]
Optional = tuple[Tensor | None, ...]


class StageNeeds(NamedTuple):
    """Which gradients a stage is asked for."""

    x: bool  # of what goes in
    own: tuple[bool, ...]  # of its operands
    any: bool  # of either
    note: Any  # the same in the stage's own words


class StageRun(NamedTuple):
    """What one forward of a stage gave."""

    out: Tensors
    extra: Optional = ()  # tensors that its backward reads beside its input and its operands
    note: Any = None  # what else its backward must know, no tensor in it
    beyond: Tensor | None = None  # act(out), where the placement's epilogue is an activation
    h: Tensor | None = None  # [M, sum R] of out, for the stage behind


class StageInput(NamedTuple):
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


class Placement(NamedTuple):
    """Where a stage finds and leaves what it computes with, where it asked for that."""

    out: Tensor | None = None  # [M, N], written by a stage that places, or for its epilogue
    prepared: StageInput | None = None  # holds x
    epilogue: Epilogue | None = None  # computed behind its y
    plan: Plan | None = None  # by which it computes an activation as its epilogue
    makes: StageInput | None = None  # of the stage behind, whose h it forms as well


FREE = Placement()


class FormedGrads(NamedTuple):
    """What a stage formed of the gradients of the linear before it, beside its dy."""

    b: Sequence[Tensor | None]  # db of its adapters
    dh: Tensor | None = None  # [M, sum R]


class GradEpilogue(NamedTuple):
    """What a backward does to dx in the pass that forms it, and to x and dy as it reads them."""

    activation_grad: ActivationGrad | None = None  # of x = act(u): dx goes on to du
    residual_grad: Tensor | None = None  # [M, K], the gradient that passed by: added
    source: str = "none"  # or GELU, erf or tanh: u is given in the place of x = GELU(u)
    norm: InputNorm | None = None  # z is given in the place of x, its LayerNorm
    formed: FormedGrads | None = None  # of its one frame, by the stage behind
    low_rank: LowRank | None = None  # that the stage behind left to be added to dy
    previous: PreviousLinear | None = None  # the linear before, whose db and dh it may form


PLAIN = GradEpilogue()


class StageGrads(NamedTuple):
    """What one backward of a stage gave."""

    x: Tensors | None  # of what went in
    own: Optional  # of the operands
    low_rank: LowRank | None = None  # dh a, which is still to be added to the one of x
    formed: FormedGrads | None = None  # of the linear right before


class Previous(NamedTuple):
    """The linear before a stage and its activation, whose db the stage may form; see there."""

    linear: PreviousLinear
    question: Problem
    plan: Plan  # of its backward where it forms db itself
    rest: Plan  # and where db is there


def never(*_: object) -> bool:
    """Of a stage that does nothing for the next."""
    return False


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
    packs = False  # whether its backward may form gradients of the linear right before it
    leaves = True  # whether its backward reads what forward left beside the boundaries

    def forward(
        self, x: Tensors, own: Optional, asked: StageNeeds, place: Placement = FREE
    ) -> StageRun:
        """One pass, as ``place`` has it."""
        raise NotImplementedError(type(self).__name__)

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,  # without its ``out``
        own: Optional,
        asked: StageNeeds,
        epilogue: GradEpilogue = PLAIN,  # of a stage that says it takes one
    ) -> StageGrads:
        """Gradients of what went in and of the operands."""
        raise NotImplementedError(type(self).__name__)

    def fuses(
        self,
        epilogue: Epilogue,
        x: Tensors,
        own: Optional,
        asked: StageNeeds,
        prepared: StageInput | None,
    ) -> Plan | None:
        """The plan by which it computes the activation behind it in its own pass; or None."""
        return None

    def joins(self, asked: StageNeeds) -> bool:
        """Whether it adds a gradient that passed by to that of what went in, in its own pass."""
        return False

    def fuses_activation_grad(self, dy: Tensors, run: StageRun, own: Optional) -> bool:
        """Whether its dx goes through the derivative of the activation before it in one pass."""
        return False

    def forms(self, previous: Previous, dy: Tensors) -> bool:
        """Whether its backward, which ``packs``, forms db and dh of that linear."""
        return False

    def opens(self, run: StageRun) -> bool:
        """Whether its dx leaves the low-rank term to whoever reads it."""
        return False

    def expands(self, x: Tensors, own: Optional, asked: StageNeeds, rank: int) -> bool:
        """Whether its backward adds a low-rank term to dy as it reads dy."""
        return False

    def previous(self, run: StageRun, own: Optional, asked: StageNeeds) -> Previous | None:
        """What the gradients of its b are formed from beside dy; None where it has to itself."""
        return None

    def takes_previous(
        self,
        previous: Previous,
        kind: str,  # of the GELU between them
        dy: Tensors,
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
    ) -> bool:
        """Whether it forms those in the pass of its dx through an activation's derivative."""
        return False

    def activates(self, dy: Tensors, run: StageRun, own: Optional, asked: StageNeeds) -> bool:
        """Whether its backward forms x = act(u) as it reads u."""
        return False

    def input_norm(self, run: StageRun, own: Optional) -> InputNorm | None:
        """What makes its output of its input anew, where it is a LayerNorm."""
        return None

    def norms(
        self,
        norm: InputNorm,
        z: Tensor,  # [M, K]
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
        formed: FormedGrads | None = None,  # what is there of its gradients
    ) -> bool:
        """Whether its backward forms x, the LayerNorm of z, as it reads z."""
        return False

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """The same from operations that autograd and the compiler know."""
        raise NotImplementedError(type(self).__name__)

    def epilogue(
        self, residual: Tensor | None, gamma: Tensor | None, mask: Tensor | None
    ) -> Epilogue | None:
        """What of residual + gamma mask z it computes as it forms z, as the last stage; or None."""
        return None

    def around(self, epilogue: Epilogue | None) -> FusionContext:
        """What its plan may count on where that ``epilogue`` follows."""
        return NO_CONTEXT

    def asked(self, x: bool, own: tuple[bool, ...]) -> Any:
        """The note of ``StageNeeds``."""
        return None

    def places(self, x: Tensors) -> bool:
        """Whether forward writes the one tensor that comes out where it is told, at no cost."""
        return False

    def shrinks(self, x: Tensors, own: Optional, adapters: Adapters) -> bool:
        """Whether forward forms h of the one tensor that comes out, in its own pass."""
        return False

    def prepared(
        self,
        like: Tensor,
        own: Optional,
        asked: StageNeeds,
        writes: bool,  # whoever makes x does so where it is told
        shrinks: Callable[[Adapters], bool],  # and forms h
        expands: Callable[[int], bool] = never,  # and adds a low-rank term to its dx
        previous: tuple[Previous, str] | None = None,  # the linear before a GELU of this kind
        around: FusionContext = NO_CONTEXT,  # what follows what it makes of x
    ) -> StageInput | None:
        """What it wants of that, and its plan; x is of as many rows as ``like`` and beside it."""
        return None

    def reads_input(self, run: StageRun, asked: StageNeeds) -> bool:
        """Whether backward reads what went in."""
        return True

    def slim(self, run: StageRun, asked: StageNeeds) -> StageRun:
        """The same run with what can be made again cheaply left out."""
        return run


@dataclass(frozen=True)
class ChainSpec:
    """Stages in order, and which boundaries inside are kept beside the source, boundary 0."""

    stages: tuple[Stage, ...]
    keep: frozenset[int] = frozenset()
    lean: bool = False  # keep neither h nor casts of weights
    around: bool = False  # the source itself is the residual

    parts: tuple[slice, ...] = field(init=False, compare=False)  # each stage's operands
    seeds: tuple[int, ...] = field(init=False, compare=False)  # which operands each call draws
    ahead: tuple[str | None, ...] = field(init=False, compare=False)  # the GELU behind a stage
    before: tuple[str | None, ...] = field(init=False, compare=False)  # and the one before it
    _asked: dict[tuple[bool, ...], tuple[StageNeeds, ...]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        slices = consecutive([stage.operands for stage in self.stages])
        object.__setattr__(self, "parts", slices)
        seeds = [
            part.start + at
            for stage, part in zip(self.stages, slices, strict=True)
            for at in stage.seeds
        ]
        object.__setattr__(self, "seeds", tuple(seeds))
        object.__setattr__(self, "_asked", {})
        kinds = [stage.gelu for stage in self.stages]
        object.__setattr__(self, "ahead", (*kinds[1:], None))
        object.__setattr__(self, "before", (None, *kinds[:-1]))

    def asked(self, flags: tuple[bool, ...]) -> tuple[StageNeeds, ...]:
        """The gradients each stage is asked for, of those of the source and every operand.

        Stages behind one that is asked for anything need the gradient of their input.
        """
        if flags not in self._asked:
            found: list[StageNeeds] = []
            x, operands = flags[0], flags[1:]
            for stage, part in zip(self.stages, self.parts, strict=True):
                own = operands[part]
                found.append(StageNeeds(x, own, x or any(own), stage.asked(x, own)))
                x = found[-1].any
            self._asked[flags] = tuple(found)
        return self._asked[flags]


def stored(
    spec: ChainSpec, runs: Sequence[StageRun], asked: Sequence[StageNeeds]
) -> tuple[set[int], int]:
    """The boundaries that backward reads from memory, and a bit for each stage it runs again."""
    found: set[int] = set()
    again = 0
    for i, stage in enumerate(spec.stages):
        if asked[i].any and stage.reads_input(runs[i], asked[i]):
            while i and i not in spec.keep:
                i -= 1
                again |= 1 << i
            found.add(i)
    return found, again


def finish(z: Tensor, residual: Tensor | None, factor: Tensor | None) -> Tensor:
    """residual + factor z, each where given; z may be overwritten."""
    if residual is None:
        return z if factor is None else z * factor
    if factor is not None:
        return torch.addcmul(residual, z, factor)
    fits = torch.promote_types(z.dtype, residual.dtype) is z.dtype
    return z.add_(residual) if fits else residual + z


def combined(factors: Optional) -> Tensor | None:
    """The product of those given."""
    first, second = factors
    return second if first is None else first if second is None else first * second
