"""The autograd node of a chain of stages, forward and back, and what is made again on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters, Ending, Slope
from fused_lora.ops.chain.stage import (
    Asked,
    ChainRecipe,
    GradEpilogue,
    Optional,
    Place,
    Room,
    StageRun,
    Tensors,
    combined,
    finish,
    stored,
)
from fused_lora.ops.lora_dropout import seeded
from fused_lora.ops.lora_linear import reshaped
from fused_lora.programs.program import Saved
from fused_lora.programs.run import call, transformed

Done = tuple[tuple[StageRun, ...], Room | None]  # of each stage, and where the last one wrote


class Steps(NamedTuple):
    """What every step of one pass through a chain is given."""

    recipe: ChainRecipe
    own: Sequence[Optional]  # the operands of each stage
    asked: Sequence[Asked]
    keep: frozenset[int]  # boundaries kept for backward
    again: bool = False  # in backward, which reads all that it makes

    def behind(self, i: int, x: Tensors, free: bool = False) -> Room | None:
        """What stage i, given x, is to do for the one behind it; what is kept lies alone.

        ``free``: it writes wherever it is told at no cost, and x has but its rows.
        """
        j, stages = i + 1, self.recipe.stages
        if j == len(stages):
            return None
        writes = j not in self.keep and (free or stages[i].places(x))
        shrinks = _never if free else partial(stages[i].shrinks, x, self.own[i])
        return stages[j].room(x[0], self.own[j], self.asked[j], writes, shrinks)

    def take(
        self,
        i: int,
        x: Tensors,
        room: Room | None,  # holds x
        ending: Ending | None = None,  # of the last stage
        place: bool = True,  # to write for the stage behind, where that asks for it
        alone: bool = False,  # stage i and no other
    ) -> Done:
        """Stage i, and with it the activation behind it where a kernel computes both."""
        stage, given = self.recipe.stages[i], (self.own[i], self.asked[i])
        kind = None if alone else self.recipe.ahead[i]
        if kind and (plan := stage.fuses(Ending(kind), x, *given, room)):
            following = self.behind(i + 1, x, free=True) if place else None
            how = Ending(kind, stores_u=self.again or i + 1 in self.keep)
            run = stage.forward(x, *given, Place(following and following.left, room, how, plan))
            assert run.beyond is not None
            return (run, StageRun((run.beyond,))), following
        following = self.behind(i, x) if place else None
        makes = following if following and following.adapters else None
        run = stage.forward(
            x, *given, Place(following and following.left, room, ending, None, makes)
        )
        if following and makes:
            following = following._replace(h=run.h)
        return (run,), following


def _never(adapters: Adapters) -> bool:
    """A product and its activation in one pass form no h."""
    return False


class Walk:
    """One backward pass: what was kept, and what has been made again so far."""

    def __init__(
        self,
        recipe: ChainRecipe,
        values: dict[int, Tensors],
        runs: list[StageRun | None],  # None where the stage has to run again
        operands: Optional,
        asked: Sequence[Asked],
    ) -> None:
        self.recipe, self.values, self.runs, self.asked = recipe, values, runs, asked
        self.own = [operands[part] for part in recipe.parts]
        self.steps = Steps(recipe, self.own, asked, recipe.keep, again=True)
        self.rooms: dict[int, Room | None] = {}  # of boundaries, each with what lies in it

    def value(self, i: int) -> Tensors:
        """Boundary i, kept or made again."""
        while i not in self.values:
            self._towards(i)
        return self.values[i]

    def _towards(self, i: int) -> None:
        """Run the stage before boundary i, or the two before it, or the first of the two."""
        two = i > 1 and i - 1 not in self.values and self.recipe.ahead[i - 2] is not None
        first = i - 2 if two else i - 1
        x, room = self.value(first), self.rooms.pop(first, None)
        place = i < len(self.runs) and self.runs[i] is None
        done, following = self.steps.take(first, x, room, place=place, alone=not two)
        self.rooms[first + len(done)] = following
        for at, run in enumerate(done, first):
            self.values[at + 1], self.runs[at] = run.out, StageRun((), run.extra, run.note)

    def through(
        self,
        dz: Tensor,
        beside: Tensor | None = None,  # [M, K]: added to the gradient of the source
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """From the gradient of the last stage's output to those of the source and the operands."""
        grads: Tensors | None = (dz,)
        down: list[Optional] = []
        sloped = False  # whether ``grads`` are those of what goes into an activation already
        for i in reversed(range(len(self.asked))):
            mine: Optional = (None,) * len(self.own[i])
            if self.asked[i].any and not sloped:
                assert grads is not None
                grads, mine, sloped = self._stage(i, grads, None if i else beside)
            else:
                sloped = False
            down.append(mine)
        dx = grads[0] if grads is not None and self.asked[0].x else None
        return dx, [grad for mine in reversed(down) for grad in mine]

    def _stage(
        self, i: int, grads: Tensors, beside: Tensor | None
    ) -> tuple[Tensors | None, Optional, bool]:
        stage, asked, own = self.recipe.stages[i], self.asked[i], self.own[i]
        if self.runs[i] is None and stage.leaves:
            self.value(i + 1)
        run, kind, x = self.runs[i] or StageRun(()), self.recipe.before[i], None
        source = "none"
        if stage.reads_input(run, asked):
            if kind and i not in self.values and stage.activates(grads, run, own, asked):
                x, source = self.value(i - 1), kind
            else:
                x = self.value(i)
        self.values.pop(i + 1, None)
        slope = None
        if kind and asked.x and beside is None and stage.slopes(grads, run, own):
            slope = Slope(kind, self.value(i - 1)[0])
            self.values.pop(i, None)
        epilogue = GradEpilogue(slope, beside, source)
        return *stage.backward(grads, x, run, own, asked, epilogue), slope is not None


# The autograd node of a chain of stages.
#
#     y = residual + gamma mask f(source),  f = the stages one after another
#
# Forward keeps the boundaries that the recipe names, and of them only what backward reads; backward
# goes through the stages from the last to the first and runs those again whose output it needs and
# does not have. With every boundary kept this is what autograd would do; with none, checkpointing
# that never runs its last stage twice.


NONE: frozenset[int] = frozenset()
FIXED = 4  # source, residual, gamma and mask stand before the operands


def chain(
    recipe: ChainRecipe,
    source: Tensor,  # [..., K]
    operands: Sequence[Tensor | None],  # those of every stage in turn
    residual: Tensor | None = None,  # [..., N]
    gamma: Tensor | None = None,  # [N], frozen
    mask: Tensor | None = None,  # broadcasts against [..., N], frozen
) -> Tensor:
    """y [..., N]; under ``torch.compile`` composed, for the compiler to fuse what it can."""
    if torch.compiler.is_compiling():
        return composed(recipe, source, operands, residual, gamma, mask)
    if transformed():
        return composed(recipe, source, operands, residual, gamma, mask)
    operation = Chain(recipe)
    return call(operation, seeded(operation, (source, residual, gamma, mask, *operands)))  # type: ignore[no-any-return]


def composed(
    recipe: ChainRecipe,
    source: Tensor,
    operands: Sequence[Tensor | None],
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The same from operations that autograd knows, each keeping what it wants."""
    values: Tensors = (source.reshape(-1, source.shape[-1]),)
    for stage, part in zip(recipe.stages, recipe.parts, strict=True):
        values = stage.compose(values, tuple(operands[part]))
    z = values[0].reshape(*source.shape[:-1], values[0].shape[1])
    for factor in (gamma, mask):
        z = z if factor is None else z * factor
    residual = source if recipe.around else residual
    return z if residual is None else residual + z


def forward(
    recipe: ChainRecipe,
    flags: tuple[bool, ...],  # whether a gradient is asked for, of the source and the operands
    source: Tensor,
    operands: Sequence[Tensor | None],
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensors], list[StageRun]]:
    """y [..., N], the boundaries that the recipe keeps for a backward, and what each stage left."""
    asked = recipe.asked(flags)
    values: dict[int, Tensors] = {0: (source.reshape(-1, source.shape[-1]),)}
    runs: list[StageRun] = []
    keep = recipe.keep if any(flags) else NONE
    steps = Steps(recipe, [tuple(operands[part]) for part in recipe.parts], asked, keep)
    beside = source if recipe.around else residual
    ending = recipe.stages[-1].ending(beside, gamma, mask)
    room: Room | None = None
    while (i := len(runs)) < len(recipe.stages):
        last = i + 1 == len(recipe.stages)
        room = _advance(steps, values, runs, room, ending if last else None)
    (z,) = values.pop(len(runs))
    z = z if source.dim() == 2 else reshaped(z, (*source.shape[:-1], z.shape[1]))
    y = z if ending else finish(z, beside, combined((gamma, mask)))
    return y, values, runs


@dataclass(frozen=True)
class Chain:
    """The operation on (source, residual, gamma, mask, *operands); gamma and mask are frozen."""

    recipe: ChainRecipe

    seeds: tuple[int, ...] = field(init=False, compare=False)  # which inputs each call draws

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(FIXED + at for at in self.recipe.seeds))

    def forward(self, inputs: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Tensor, Saved]:
        """y [..., N]."""
        source, residual, gamma, mask, *operands = inputs
        flags, recipe = (needs[0], *needs[FIXED:]), self.recipe
        y, values, runs = forward(recipe, flags, source, operands, residual, gamma, mask)
        given = (gamma, mask, *operands)
        saved, note = _to_save(recipe, values, runs, recipe.asked(flags), given)
        like = source.shape, source.dtype, None if residual is None else residual.dtype
        return y, (saved, (note, like))

    def backward(
        self, saved: Saved, grads: Sequence[Any], needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """Gradients of source, residual and operands, where asked for."""
        tensors, (note, (shape, dtype, beside)) = saved
        (dy,) = grads
        walk, factor = _load(self.recipe, tensors, note)
        dz = dy if factor is None else dy * factor
        around = self.recipe.around and walk.asked[0].x
        joins = around and self.recipe.stages[0].joins(walk.asked[0])
        passed = dy.reshape(-1, dy.shape[-1]) if joins else None
        dx, down = walk.through(dz.reshape(-1, dz.shape[-1]), passed)
        dx = dx if dx is None else dx.view(shape).to(dtype)
        if around and not joins:
            assert dx is not None
            dx = dx.add_(dy)
        return dx, dy.to(beside) if needs[1] else None, None, None, *down


def _advance(
    steps: Steps,
    values: dict[int, Tensors],
    runs: list[StageRun],
    room: Room | None,
    ending: Ending | None,
) -> Room | None:
    """Take the next step, keeping of the boundaries behind it what is to be kept."""
    first = len(runs)
    done, following = steps.take(first, values[first], room, ending)
    for at, run in enumerate(done, first):
        if at and at not in steps.keep:
            del values[at]
        values[at + 1] = run.out
        runs.append(StageRun((), run.extra, run.note))
    return following


def _to_save(
    recipe: ChainRecipe,
    values: dict[int, Tensors],
    runs: list[StageRun],
    asked: Sequence[Asked],
    given: Optional,  # gamma, mask and the operands
) -> Saved:
    if recipe.lean:
        runs = [s.slim(run, own) for s, run, own in zip(recipe.stages, runs, asked, strict=True)]
    kept, again = stored(recipe, runs, asked)
    flat = list(given)
    for i in kept:
        flat += values[i]
    for i, run in enumerate(runs):
        flat += () if again >> i & 1 else run.extra
    notes = [None if again >> i & 1 else (len(r.extra), r.note) for i, r in enumerate(runs)]
    return flat, (asked, [(i, len(values[i])) for i in kept], notes)


def _load(recipe: ChainRecipe, tensors: Sequence[Any], note: Any) -> tuple[Walk, Tensor | None]:
    asked, kept, notes = note
    first = 2 + recipe.parts[-1].stop
    given, values, runs = tuple(tensors[:first]), {}, []
    for i, length in kept:
        values[i] = tuple(tensors[first : first + length])
        first += length
    for each in notes:
        length = each[0] if each else 0
        extra = tuple(tensors[first : first + length])
        runs.append(StageRun((), extra, each[1]) if each else None)
        first += length
    return Walk(recipe, values, runs, given[2:], asked), combined(given[:2])
