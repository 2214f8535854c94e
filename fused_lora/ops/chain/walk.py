"""The backward of a chain: from its last stage to its first, with what was not kept made again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_lora.kernels.interface import Slope
from fused_lora.ops.chain.recipe import Recipe
from fused_lora.ops.chain.stage import Asked, Optional, Room, Run, Tensors
from fused_lora.ops.chain.step import Steps


class Walk:
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
            self.values[at + 1], self.runs[at] = run.out, Run((), run.extra, run.note)

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
        if self.runs[i] is None:
            self.value(i + 1)
        run, stage, asked = self.runs[i], self.recipe.stages[i], self.asked[i]
        assert run is not None
        x = self.value(i) if stage.reads_input(run, asked) else None
        self.values.pop(i + 1, None)
        kind, own = self.recipe.before[i], self.own[i]
        if beside is not None:
            return *stage.joined(grads, x, run, own, asked, beside), False
        if not (kind and asked.x and stage.slopes(grads, run, own)):
            return *stage.backward(grads, x, run, own, asked), False
        slope = Slope(kind, self.value(i - 1)[0])
        self.values.pop(i, None)
        return *stage.sloped(grads, x, run, own, asked, slope), True
