"""What a chain computes and what it keeps: stages, kept boundaries, what follows the last stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fused_lora.ops.chain.stage import Asked, Optional, Run, Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """Stages in order, and which boundaries inside are kept beside the source, boundary 0."""

    stages: tuple[Stage, ...]
    keep: frozenset[int] = frozenset()
    lean: bool = False  # keep neither h nor casts of weights
    around: bool = False  # the source itself is the residual

    def slices(self, operands: Sequence[T]) -> Iterator[tuple[T, ...]]:
        """Each stage's part of a sequence that holds something for every operand."""
        first = 0
        for stage in self.stages:
            yield tuple(operands[first : first + stage.operands])
            first += stage.operands

    def asked(self, x: bool, operands: Sequence[bool]) -> list[Asked]:
        """The gradients each stage is asked for: those behind it need the one of its input."""
        found: list[Asked] = []
        for own in self.slices(operands):
            found.append(Asked(x, own))
            x = bool(found[-1])
        return found


def saved(recipe: Recipe, runs: list[Run], asked: list[Asked]) -> tuple[set[int], list[bool]]:
    """The boundaries that backward reads from memory, and the stages that it runs again."""
    stored: set[int] = set()
    again = [False] * len(runs)

    def require(i: int) -> None:
        if i == 0 or i in recipe.keep:
            stored.add(i)
        elif not again[i - 1]:
            again[i - 1] = True
            require(i - 1)

    for i, stage in enumerate(recipe.stages):
        if asked[i] and stage.reads_input(runs[i], asked[i]):
            require(i)
    return stored, again


def finish(z: Tensor, residual: Tensor | None, factors: Optional) -> Tensor:
    """residual + gamma mask z, each where given; z may be overwritten."""
    factor = combined(factors)
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
