"""What a chain computes and what it keeps: stages, kept boundaries, what follows the last stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_lora.ops.chain.stage import Asked, Optional, Run, Stage, consecutive


@dataclass(frozen=True)
class Recipe:
    """Stages in order, and which boundaries inside are kept beside the source, boundary 0."""

    stages: tuple[Stage, ...]
    keep: frozenset[int] = frozenset()
    lean: bool = False  # keep neither h nor casts of weights
    around: bool = False  # the source itself is the residual

    parts: tuple[slice, ...] = field(init=False, compare=False)  # each stage's operands
    seeds: tuple[int, ...] = field(init=False, compare=False)  # which operands each call draws
    ahead: tuple[str | None, ...] = field(init=False, compare=False)  # the GELU behind a stage
    before: tuple[str | None, ...] = field(init=False, compare=False)  # and the one before it
    _asked: dict[tuple[bool, ...], tuple[Asked, ...]] = field(init=False, compare=False)

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

    def asked(self, flags: tuple[bool, ...]) -> tuple[Asked, ...]:
        """The gradients each stage is asked for, of those of the source and every operand.

        Stages behind one that is asked for anything need the gradient of their input.
        """
        if flags not in self._asked:
            found: list[Asked] = []
            x, operands = flags[0], flags[1:]
            for stage, part in zip(self.stages, self.parts, strict=True):
                own = operands[part]
                found.append(Asked(x, own, x or any(own), stage.asked(x, own)))
                x = found[-1].any
            self._asked[flags] = tuple(found)
        return self._asked[flags]


def stored(recipe: Recipe, runs: Sequence[Run], asked: Sequence[Asked]) -> tuple[set[int], int]:
    """The boundaries that backward reads from memory, and a bit for each stage it runs again."""
    found: set[int] = set()
    again = 0
    for i, stage in enumerate(recipe.stages):
        if asked[i].any and stage.reads_input(runs[i], asked[i]):
            while i and i not in recipe.keep:
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
