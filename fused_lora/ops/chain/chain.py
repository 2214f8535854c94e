"""The autograd node of a chain of stages.

    y = residual + gamma mask f(source),  f = the stages one after another

Forward keeps the boundaries that the recipe names, and of them only what backward reads; backward
goes through the stages from the last to the first and runs those again whose output it needs and
does not have. With every boundary kept this is what autograd would do; with none, checkpointing
that never runs its last stage twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.interface import Ending
from fused_lora.ops.chain.recipe import Recipe, combined, finish, stored
from fused_lora.ops.chain.stage import Asked, Optional, Room, Run, Tensors
from fused_lora.ops.chain.step import Steps
from fused_lora.ops.chain.walk import Walk
from fused_lora.ops.dropped import seeded
from fused_lora.ops.lora_linear import reshaped
from fused_lora.programs.program import Saved
from fused_lora.programs.run import call, transformed

NONE: frozenset[int] = frozenset()
FIXED = 4  # source, residual, gamma and mask stand before the operands


def chain(
    recipe: Recipe,
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
    recipe: Recipe,
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
    recipe: Recipe,
    flags: tuple[bool, ...],  # whether a gradient is asked for, of the source and the operands
    source: Tensor,
    operands: Sequence[Tensor | None],
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensors], list[Run]]:
    """y [..., N], the boundaries that the recipe keeps for a backward, and what each stage left."""
    asked = recipe.asked(flags)
    values: dict[int, Tensors] = {0: (source.reshape(-1, source.shape[-1]),)}
    runs: list[Run] = []
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

    recipe: Recipe

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
    runs: list[Run],
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
        runs.append(Run((), run.extra, run.note))
    return following


def _to_save(
    recipe: Recipe,
    values: dict[int, Tensors],
    runs: list[Run],
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


def _load(recipe: Recipe, tensors: Sequence[Any], note: Any) -> tuple[Walk, Tensor | None]:
    asked, kept, notes = note
    first = 2 + recipe.parts[-1].stop
    given, values, runs = tuple(tensors[:first]), {}, []
    for i, length in kept:
        values[i] = tuple(tensors[first : first + length])
        first += length
    for each in notes:
        length = each[0] if each else 0
        extra = tuple(tensors[first : first + length])
        runs.append(Run((), extra, each[1]) if each else None)
        first += length
    return Walk(recipe, values, runs, given[2:], asked), combined(given[:2])
