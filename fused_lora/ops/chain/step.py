"""One step of a chain forward: a stage, or a product and the GELU behind it in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from fused_lora.kernels.interface import Adapters, Ending
from fused_lora.ops.chain.recipe import Recipe
from fused_lora.ops.chain.stage import Asked, Optional, Place, Room, Run, Tensors

Done = tuple[tuple[Run, ...], Room | None]  # of each stage, and where the last one wrote


class Steps(NamedTuple):
    """What every step of one pass through a chain is given."""

    recipe: Recipe
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
            return (run, Run((run.beyond,))), following
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
