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

from fused_lora.ops.chain.recipe import Recipe, combined, finish, saved
from fused_lora.ops.chain.stage import Asked, Optional, Run, Tensors
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
    for stage, own in zip(recipe.stages, recipe.slices(operands), strict=True):
        values = stage.compose(values, own)
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
        own = list(recipe.slices(operands))
        asked = recipe.asked(ctx.needs_input_grad[4], ctx.needs_input_grad[FIXED:])
        values: dict[int, Tensors] = {0: (source.reshape(-1, source.shape[-1]),)}
        runs: list[Run] = []
        with without_autocast(source.device):
            for i, stage in enumerate(recipe.stages):
                run = stage.forward(values[i], own[i], asked[i])
                if i and i not in recipe.keep:
                    del values[i]
                values[i + 1] = run.out
                runs.append(run._replace(out=()))
            (z,) = values.pop(len(runs))
            z = z if source.dim() == 2 else reshaped(z, (*source.shape[:-1], z.shape[1]))
            y = finish(z, source if recipe.around else residual, (gamma, mask))
        _save(ctx, recipe, values, runs, asked, operands, (gamma, mask))
        ctx.dtypes = (None if residual is None else residual.dtype, source.shape)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Gradients of residual, source and operands, where asked for."""
        refuse_double_backward()
        recipe, asked = ctx.meta[0], ctx.asked
        residual, shape = ctx.dtypes
        values, runs, own, factors = _load(ctx)
        with without_autocast(dy.device):
            factor = combined(factors)
            dz = dy if factor is None else dy * factor
            walk = _Backward(recipe, values, runs, own, asked)
            dx, down = walk.through(dz.reshape(-1, dz.shape[-1]))
            dx = dx if dx is None else dx.view(shape)
            if recipe.around and ctx.needs_input_grad[4]:
                dx = dx.add_(dy)
        down = [grad if need else None for grad, need in zip(down, ctx.needs_input_grad[FIXED:])]
        beside = dy.to(residual) if ctx.needs_input_grad[1] else None
        return None, beside, None, None, dx, *down


class _Backward:
    """One backward pass: what was kept, and what has been made again so far."""

    def __init__(
        self,
        recipe: Recipe,
        values: dict[int, Tensors],
        runs: list[Run | None],  # None where the stage has to run again
        own: list[Optional],
        asked: list[Asked],
    ) -> None:
        self.stages, self.values, self.runs = recipe.stages, values, runs
        self.own, self.asked = own, asked

    def value(self, i: int) -> Tensors:
        """Boundary i, kept or made again."""
        if i not in self.values:
            run = self.stages[i - 1].forward(self.value(i - 1), self.own[i - 1], self.asked[i - 1])
            self.values[i], self.runs[i - 1] = run.out, run._replace(out=())
        return self.values[i]

    def through(self, dz: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """From the gradient of the last stage's output to those of the source and the operands."""
        grads: Tensors | None = (dz,)
        down: list[Optional] = []
        for i in reversed(range(len(self.stages))):
            if not self.asked[i]:
                down.append((None,) * len(self.own[i]))
                continue
            assert grads is not None
            grads, mine = self._stage(i, grads)
            down.append(mine)
        dx = grads[0] if grads is not None and self.asked[0].x else None
        return dx, [grad for mine in reversed(down) for grad in mine]

    def _stage(self, i: int, grads: Tensors) -> tuple[Tensors | None, Optional]:
        if self.runs[i] is None:
            self.value(i + 1)
        run, stage, asked = self.runs[i], self.stages[i], self.asked[i]
        assert run is not None
        x = self.value(i) if stage.reads_input(run, asked) else None
        self.values.pop(i + 1, None)
        return stage.backward(grads, x, run, self.own[i], asked)


def _save(
    ctx: Any,
    recipe: Recipe,
    values: dict[int, Tensors],
    runs: list[Run],
    asked: list[Asked],
    operands: Sequence[Tensor | None],
    factors: Optional,
) -> None:
    if recipe.lean:
        pairs = zip(recipe.stages, runs, asked, strict=True)
        runs = [stage.slim(run, mine) for stage, run, mine in pairs]
    stored, again = saved(recipe, runs, asked)
    kept = [(i, values[i]) for i in sorted(stored)]
    extras = [() if redo else run.extra for run, redo in zip(runs, again, strict=True)]
    notes = [None if redo else run for run, redo in zip(runs, again, strict=True)]
    flat = [t for _, tensors in kept for t in tensors] + [t for extra in extras for t in extra]
    ctx.meta = (
        recipe,
        [(i, len(tensors)) for i, tensors in kept],
        [None if run is None else (len(run.extra), run.note) for run in notes],
    )
    ctx.asked = asked
    ctx.save_for_backward(*factors, *operands, *flat)


def _load(ctx: Any) -> tuple[dict[int, Tensors], list[Run | None], list[Optional], Optional]:
    recipe, kept, notes = ctx.meta
    tensors = iter(ctx.saved_tensors)
    factors = (next(tensors), next(tensors))
    count = sum(stage.operands for stage in recipe.stages)
    own = list(recipe.slices([next(tensors) for _ in range(count)]))
    values = {i: tuple(next(tensors) for _ in range(length)) for i, length in kept}
    runs = [
        None if note is None else Run((), tuple(next(tensors) for _ in range(note[0])), note[1])
        for note in notes
    ]
    return values, runs, own, factors
