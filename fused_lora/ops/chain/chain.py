"""The autograd node of a chain of stages.

    y = residual + gamma mask f(source),  f = the stages one after another

Forward keeps the boundaries that the recipe names, and of them only what backward reads; backward
goes through the stages from the last to the first and runs those again whose output it needs and
does not have. With every boundary kept this is what autograd would do; with none, checkpointing
that never runs its last stage twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops.chain.recipe import Recipe, combined, finish, stored
from fused_lora.ops.chain.stage import Asked, Optional, Place, Room, Run, Tensors
from fused_lora.ops.lora_linear import refuse_double_backward, reshaped, without_autocast

FIXED = 5  # recipe, residual, gamma, mask and source stand before the operands


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
    return Chain.apply(recipe, residual, gamma, mask, source, *operands)


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


class Chain(torch.autograd.Function):
    """``apply(recipe, residual, gamma, mask, source, *operands)``; gamma and mask are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        residual: Tensor | None,  # [..., N]
        gamma: Tensor | None,  # [N]
        mask: Tensor | None,  # broadcasts against [..., N]
        source: Tensor,  # [..., K]
        *operands: Tensor | None,
    ) -> Tensor:
        """y [..., N]."""
        asked = recipe.asked(ctx.needs_input_grad[FIXED - 1 :])
        values: dict[int, Tensors] = {0: (source.reshape(-1, source.shape[-1]),)}
        runs: list[Run] = []
        with without_autocast(source.device):
            own = [operands[part] for part in recipe.parts]
            beside = source if recipe.around else residual
            ending = recipe.stages[-1].ending(beside, gamma, mask)
            room: Room | None = None
            for i, stage in enumerate(recipe.stages):
                following = behind(recipe, i, values[i], own, asked)
                last = i + 1 == len(recipe.stages)
                place = Place(following and following.left, room, ending if last else None)
                run = stage.forward(values[i], own[i], asked[i], place)
                room = following
                if i and i not in recipe.keep:
                    del values[i]
                values[i + 1] = run.out
                runs.append(Run((), run.extra, run.note))
            (z,) = values.pop(len(runs))
            z = z if source.dim() == 2 else reshaped(z, (*source.shape[:-1], z.shape[1]))
            y = z if ending else finish(z, beside, combined((gamma, mask)))
        _save(ctx, recipe, values, runs, asked, (gamma, mask, *operands))
        ctx.like = source.shape, source.dtype, None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Gradients of residual, source and operands, where asked for."""
        refuse_double_backward()
        needed, (shape, dtype, beside) = ctx.needs_input_grad, ctx.like
        with without_autocast(dy.device):
            walk, factor = _load(ctx)
            dz = dy if factor is None else dy * factor
            dx, down = walk.through(dz.reshape(-1, dz.shape[-1]))
            dx = dx if dx is None else dx.view(shape).to(dtype)
            if walk.recipe.around and dx is not None:
                dx = dx.add_(dy)
        down = [grad if need else None for grad, need in zip(down, needed[FIXED:], strict=True)]
        return None, dy.to(beside) if needed[1] else None, None, None, dx, *down


def behind(
    recipe: Recipe, i: int, x: Tensors, own: Sequence[Optional], asked: Sequence[Asked]
) -> Room | None:
    """Where stage i, given x, is to write for the one behind it; what is kept lies alone."""
    following = i + 1
    if following == len(recipe.stages) or following in recipe.keep:
        return None
    if not recipe.stages[i].places(x):
        return None
    return recipe.stages[following].room(x[0], own[following], asked[following])


class _Backward:
    """One backward pass: what was kept, and what has been made again so far."""

    def __init__(
        self,
        recipe: Recipe,
        values: dict[int, Tensors],
        runs: list[Run | None],  # None where the stage has to run again
        operands: Optional,
        asked: Sequence[Asked],
    ) -> None:
        self.recipe, self.values, self.runs, self.asked = recipe, values, runs, asked
        self.own = [operands[part] for part in recipe.parts]
        self.rooms: dict[int, Room | None] = {}

    def value(self, i: int) -> Tensors:
        """Boundary i, kept or made again."""
        if i not in self.values:
            before, last = self.value(i - 1), i - 1
            if i < len(self.runs) and self.runs[i] is None:
                self.rooms[i] = behind(self.recipe, last, before, self.own, self.asked)
            following, room = self.rooms.get(i), self.rooms.pop(last, None)
            place = Place(following and following.left, room)
            run = self.recipe.stages[last].forward(before, self.own[last], self.asked[last], place)
            self.values[i], self.runs[last] = run.out, Run((), run.extra, run.note)
        return self.values[i]

    def through(self, dz: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """From the gradient of the last stage's output to those of the source and the operands."""
        grads: Tensors | None = (dz,)
        down: list[Optional] = []
        for i in reversed(range(len(self.asked))):
            mine: Optional = (None,) * len(self.own[i])
            if self.asked[i].any:
                assert grads is not None
                grads, mine = self._stage(i, grads)
            down.append(mine)
        dx = grads[0] if grads is not None and self.asked[0].x else None
        return dx, [grad for mine in reversed(down) for grad in mine]

    def _stage(self, i: int, grads: Tensors) -> tuple[Tensors | None, Optional]:
        if self.runs[i] is None:
            self.value(i + 1)
        run, stage, asked = self.runs[i], self.recipe.stages[i], self.asked[i]
        assert run is not None
        x = self.value(i) if stage.reads_input(run, asked) else None
        self.values.pop(i + 1, None)
        return stage.backward(grads, x, run, self.own[i], asked)


def _save(
    ctx: Any,
    recipe: Recipe,
    values: dict[int, Tensors],
    runs: list[Run],
    asked: Sequence[Asked],
    given: Optional,  # gamma, mask and the operands
) -> None:
    if recipe.lean:
        runs = [s.slim(run, own) for s, run, own in zip(recipe.stages, runs, asked, strict=True)]
    kept, again = stored(recipe, runs, asked)
    flat = list(given)
    for i in kept:
        flat += values[i]
    for i, run in enumerate(runs):
        flat += () if again >> i & 1 else run.extra
    notes = [None if again >> i & 1 else (len(r.extra), r.note) for i, r in enumerate(runs)]
    ctx.meta = (recipe, asked, [(i, len(values[i])) for i in kept], notes)
    ctx.save_for_backward(*flat)


def _load(ctx: Any) -> tuple[_Backward, Tensor | None]:
    recipe, asked, kept, notes = ctx.meta
    tensors = ctx.saved_tensors
    first = 2 + recipe.parts[-1].stop
    given, values, runs = tensors[:first], {}, []
    for i, length in kept:
        values[i] = tensors[first : first + length]
        first += length
    for note in notes:
        length = note[0] if note else 0
        runs.append(Run((), tensors[first : first + length], note[1]) if note else None)
        first += length
    return _Backward(recipe, values, runs, given[2:], asked), combined(given[:2])


def labels(ctx: Any) -> list[str]:
    """A name for each of a chain's saved tensors, for those who count them."""
    recipe, _, kept, notes = ctx.meta
    names = [f"{type(stage).__name__} {i}" for i, stage in enumerate(recipe.stages)]
    found = ["gamma", "mask"]
    for name, part in zip(names, recipe.parts, strict=True):
        found += [f"{name} operand"] * (part.stop - part.start)
    for i, length in kept:
        found += [f"{names[i]} input"] * length
    for name, note in zip(names, notes, strict=True):
        found += [f"{name} beside"] * (note[0] if note else 0)
    return found
