"""The autograd node of a chain of stages, forward and back, and what is made again on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.aten.lora_linear import expand_grad
from fused_lora.kernels.interface import ActivationGrad, Epilogue, LowRank, PreviousLinear
from fused_lora.ops.chain.stage import (
    PLAIN,
    ChainSpec,
    FormedGrads,
    GradEpilogue,
    Optional,
    Placement,
    Previous,
    StageGrads,
    StageInput,
    StageNeeds,
    StageRun,
    Tensors,
    combined,
    finish,
    never,
    stored,
)
from fused_lora.ops.lora_dropout import seeded
from fused_lora.ops.lora_linear import reshaped
from fused_lora.programs.program import Saved
from fused_lora.programs.run import call, transformed
from fused_lora.types import NO_CONTEXT, FusionContext

Done = tuple[tuple[StageRun, ...], StageInput | None]  # of each stage, and where the last one wrote


class ChainPass(NamedTuple):
    """What every step of one pass through a chain is given."""

    spec: ChainSpec
    own: Sequence[Optional]  # the operands of each stage
    asked: Sequence[StageNeeds]
    keep: frozenset[int]  # boundaries kept for backward
    again: bool = False  # in backward, which reads all that it makes
    around: FusionContext = NO_CONTEXT  # what the last stage is told of a residual to add

    def behind(
        self, i: int, x: Tensors, free: bool = False, before: StageRun | None = None
    ) -> StageInput | None:
        """What stage i, given x, is to do for the one behind it; what is kept lies alone.

        ``free``: it writes wherever it is told at no cost, and x has but its rows. ``before``: what
        the stage before it left.
        """
        j, stages = i + 1, self.spec.stages
        if j == len(stages):
            return None
        writes = j not in self.keep and (free or stages[i].places(x))
        shrinks = never if free else partial(stages[i].shrinks, x, self.own[i])
        expands = never if free else partial(stages[i].expands, x, self.own[i], self.asked[i])
        previous = self._previous(i, before) if before else None
        around = self.around if j + 1 == len(stages) else NO_CONTEXT
        given = (x[0], self.own[j], self.asked[j], writes, shrinks)
        return stages[j].prepared(*given, expands, previous, around)

    def _previous(self, i: int, before: StageRun) -> tuple[Previous, str] | None:
        """The linear before stage i, if that is a GELU, and which it is."""
        if (kind := self.spec.stages[i].gelu) is None:
            return None
        found = self.spec.stages[i - 1].previous(before, self.own[i - 1], self.asked[i - 1])
        return (found, kind) if found else None

    def take(
        self,
        i: int,
        x: Tensors,
        prepared: StageInput | None,  # holds x
        epilogue: Epilogue | None = None,  # of the last stage
        place: bool = True,  # to write for the stage behind, where that asks for it
        alone: bool = False,  # stage i and no other
        before: StageRun | None = None,  # what the stage before it left, where that is known
    ) -> Done:
        """Stage i, and with it the activation behind it where a kernel computes both."""
        stage, given = self.spec.stages[i], (self.own[i], self.asked[i])
        kind = None if alone else self.spec.ahead[i]
        if kind and (plan := stage.fuses(Epilogue(kind), x, *given, prepared)):
            following = self.behind(i + 1, x, free=True) if place else None
            how = Epilogue(kind, stores_u=self.again or i + 1 in self.keep)
            run = stage.forward(
                x, *given, Placement(following and following.left, prepared, how, plan)
            )
            assert run.beyond is not None
            return (run, StageRun((run.beyond,))), following
        following = self.behind(i, x, before=before) if place else None
        makes = following if following and following.adapters else None
        run = stage.forward(
            x, *given, Placement(following and following.left, prepared, epilogue, None, makes)
        )
        if following and makes:
            following = following._replace(h=run.h)
        return (run,), following


class ChainBackward:
    """One backward pass: what was kept, and what has been made again so far."""

    def __init__(
        self,
        spec: ChainSpec,
        values: dict[int, Tensors],
        runs: list[StageRun | None],  # None where the stage has to run again
        operands: Optional,
        asked: Sequence[StageNeeds],
    ) -> None:
        self.spec, self.values, self.runs, self.asked = spec, values, runs, asked
        self.own = [operands[part] for part in spec.parts]
        self.steps = ChainPass(spec, self.own, asked, spec.keep, again=True)
        self.prepared: dict[int, StageInput | None] = {}  # of boundaries, each with what lies in it
        self.formed: dict[int, FormedGrads] = {}  # of stages, by the one behind each

    def value(self, i: int) -> Tensors:
        """Boundary i, kept or made again."""
        while i not in self.values:
            self._towards(i)
        return self.values[i]

    def _towards(self, i: int) -> None:
        """Run the stage before boundary i, or the two before it, or the first of the two."""
        two = i > 1 and i - 1 not in self.values and self.spec.ahead[i - 2] is not None
        first = i - 2 if two else i - 1
        x, prepared = self.value(first), self.prepared.pop(first, None)
        place = i < len(self.runs) and self.runs[i] is None
        how: dict[str, Any] = dict(place=place, alone=not two)
        before = self.runs[first - 1] if first else None
        done, following = self.steps.take(first, x, prepared, before=before, **how)
        self.prepared[first + len(done)] = following
        for at, run in enumerate(done, first):
            self.values[at + 1], self.runs[at] = run.out, StageRun((), run.extra, run.note)

    def through(
        self,
        dz: Tensor,
        residual_grad: Tensor | None = None,  # [M, K]: added to the gradient of the source
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """From the gradient of the last stage's output to those of the source and the operands."""
        grads: Tensors | None = (dz,)
        low_rank: LowRank | None = None  # that is to be added to ``grads``
        down: list[Optional] = []
        input_activated = (
            False  # whether ``grads`` are those of what goes into an activation already
        )
        for i in reversed(range(len(self.asked))):
            mine: Optional = (None,) * len(self.own[i])
            if self.asked[i].any and not input_activated:
                assert grads is not None
                passed = None if i else residual_grad
                found, input_activated = self._stage(i, grads, low_rank, passed)
                grads, mine, low_rank, _ = found
            else:
                input_activated = False
            down.append(mine)
        if grads is not None and low_rank:
            grads = _closed(grads, low_rank)
        dx = grads[0] if grads is not None and self.asked[0].x else None
        return dx, [grad for mine in reversed(down) for grad in mine]

    def _stage(
        self, i: int, grads: Tensors, low_rank: LowRank | None, residual_grad: Tensor | None
    ) -> tuple[StageGrads, bool]:
        """The gradients of stage i, and whether they are through the activation before it."""
        stage, asked, own = self.spec.stages[i], self.asked[i], self.own[i]
        if self.runs[i] is None and stage.leaves:
            self.value(i + 1)
        run, kind, x = self.runs[i] or StageRun(()), self.spec.before[i], None
        formed, previous = PLAIN, None
        through = False
        if kind and asked.x and residual_grad is None:
            through = stage.fuses_activation_grad(grads, run, own)
            if through or stage.opens(run):
                previous = self._previous(i, kind, grads, run)
            through = through or previous is not None
        if previous is None and stage.reads_input(run, asked):
            x, formed = self._input(i, grads, run)
        self.values.pop(i + 1, None)
        activation_grad = None
        if through:
            assert kind is not None
            activation_grad = ActivationGrad(kind, self.value(i - 1)[0], previous)
            self.values.pop(i, None)
        if low_rank and not (x and stage.expands(x, own, asked, low_rank.adapters.rank)):
            grads, low_rank = _closed(grads, low_rank), None
        epilogue = formed._replace(
            activation_grad=activation_grad,
            residual_grad=residual_grad,
            formed=self.formed.pop(i, None),
            low_rank=low_rank,
            previous=self._right_before(i, grads) if stage.packs else None,
        )
        found = stage.backward(grads, x, run, own, asked, epilogue)
        if found.formed:
            self.formed[i - 1] = found.formed
        return found, activation_grad is not None

    def _right_before(self, i: int, grads: Tensors) -> PreviousLinear | None:
        """The linear before stage i, where stage i forms its db and dh as it writes its dy."""
        before = self.runs[i - 1] if i else None
        if before is None:
            return None
        found = self.spec.stages[i - 1].previous(before, self.own[i - 1], self.asked[i - 1])
        if found is None or not self.spec.stages[i].forms(found, grads):
            return None
        return _to_form(found.linear, True)

    def _input(self, i: int, grads: Tensors, run: StageRun) -> tuple[Tensors, GradEpilogue]:
        """What stage i reads for x, and how it forms x of that."""
        kind, given = self.spec.before[i], (run, self.own[i], self.asked[i])
        stage = self.spec.stages[i]
        before = self.runs[i - 1] if i else None
        if i in self.values or i == 0:
            return self.value(i), PLAIN
        if kind and stage.activates(grads, *given):
            return self.value(i - 1), GradEpilogue(source=kind)
        norm = before and self.spec.stages[i - 1].input_norm(before, self.own[i - 1])
        if norm and stage.norms(norm, self.value(i - 1)[0], *given, self.formed.get(i)):
            return self.value(i - 1), GradEpilogue(norm=norm)
        return self.value(i), PLAIN

    def _previous(self, i: int, kind: str, grads: Tensors, run: StageRun) -> PreviousLinear | None:
        """The linear before stage i and its activation, where stage i forms gradients of its b."""
        before = self.runs[i - 2] if i > 1 else None
        if before is None:
            return None
        found = self.spec.stages[i - 2].previous(before, self.own[i - 2], self.asked[i - 2])
        given = (grads, run, self.own[i], self.asked[i])
        if found is None or not self.spec.stages[i].takes_previous(found, kind, *given):
            return None
        linear = _to_form(found.linear, self.spec.stages[i].opens(run))
        self.formed[i - 2] = FormedGrads(linear.b_grads, linear.dh)
        return linear


def _to_form(linear: PreviousLinear, dh: bool) -> PreviousLinear:
    """With room for db, and for dh where that is formed too."""
    b_grads = [torch.empty_like(b_g) for b_g in linear.adapters.b]
    return linear._replace(b_grads=b_grads, dh=torch.empty_like(linear.h) if dh else None)


def _closed(grads: Tensors, low_rank: LowRank) -> Tensors:
    """With the low-rank term in a pass of its own."""
    (dx,), (dh, adapters) = grads, low_rank
    return (expand_grad(dx, dh, adapters.to(dx.dtype)),)


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
    spec: ChainSpec,
    source: Tensor,  # [..., K]
    operands: Sequence[Tensor | None],  # those of every stage in turn
    residual: Tensor | None = None,  # [..., N]
    gamma: Tensor | None = None,  # [N], frozen
    mask: Tensor | None = None,  # broadcasts against [..., N], frozen
) -> Tensor:
    """y [..., N]; under ``torch.compile`` composed, for the compiler to fuse what it can."""
    if torch.compiler.is_compiling():
        return composed(spec, source, operands, residual, gamma, mask)
    if transformed():
        return composed(spec, source, operands, residual, gamma, mask)
    operation = Chain(spec)
    return call(operation, seeded(operation, (source, residual, gamma, mask, *operands)))  # type: ignore[no-any-return]


def composed(
    spec: ChainSpec,
    source: Tensor,
    operands: Sequence[Tensor | None],
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The same from operations that autograd knows, each keeping what it wants."""
    values: Tensors = (source.reshape(-1, source.shape[-1]),)
    for stage, part in zip(spec.stages, spec.parts, strict=True):
        values = stage.compose(values, tuple(operands[part]))
    z = values[0].reshape(*source.shape[:-1], values[0].shape[1])
    for factor in (gamma, mask):
        z = z if factor is None else z * factor
    residual = source if spec.around else residual
    return z if residual is None else residual + z


def forward(
    spec: ChainSpec,
    flags: tuple[bool, ...],  # whether a gradient is asked for, of the source and the operands
    source: Tensor,
    operands: Sequence[Tensor | None],
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensors], list[StageRun]]:
    """y [..., N], the boundaries that the recipe keeps for a backward, and what each stage left."""
    asked = spec.asked(flags)
    values: dict[int, Tensors] = {0: (source.reshape(-1, source.shape[-1]),)}
    runs: list[StageRun] = []
    keep = spec.keep if any(flags) else NONE
    added = source if spec.around else residual
    epilogue = spec.stages[-1].epilogue(added, gamma, mask)
    own = [tuple(operands[part]) for part in spec.parts]
    steps = ChainPass(spec, own, asked, keep, around=spec.stages[-1].around(epilogue))
    prepared: StageInput | None = None
    while (i := len(runs)) < len(spec.stages):
        last = i + 1 == len(spec.stages)
        prepared = _advance(steps, values, runs, prepared, epilogue if last else None)
    (z,) = values.pop(len(runs))
    z = z if source.dim() == 2 else reshaped(z, (*source.shape[:-1], z.shape[1]))
    y = z if epilogue else finish(z, added, combined((gamma, mask)))
    return y, values, runs


@dataclass(frozen=True)
class Chain:
    """The operation on (source, residual, gamma, mask, *operands); gamma and mask are frozen."""

    spec: ChainSpec

    seeds: tuple[int, ...] = field(init=False, compare=False)  # which inputs each call draws

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(FIXED + at for at in self.spec.seeds))

    def forward(self, inputs: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Tensor, Saved]:
        """y [..., N]."""
        source, residual, gamma, mask, *operands = inputs
        flags, spec = (needs[0], *needs[FIXED:]), self.spec
        y, values, runs = forward(spec, flags, source, operands, residual, gamma, mask)
        given = (gamma, mask, *operands)
        saved, note = _to_save(spec, values, runs, spec.asked(flags), given)
        like = source.shape, source.dtype, None if residual is None else residual.dtype
        return y, (saved, (note, like))

    def backward(
        self, saved: Saved, grads: Sequence[Any], needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """Gradients of source, residual and operands, where asked for."""
        tensors, (note, (shape, dtype, residual_dtype)) = saved
        (dy,) = grads
        chain_backward, factor = _load(self.spec, tensors, note)
        dz = dy if factor is None else dy * factor
        around = self.spec.around and chain_backward.asked[0].x
        joins = around and self.spec.stages[0].joins(chain_backward.asked[0])
        passed = dy.reshape(-1, dy.shape[-1]) if joins else None
        dx, down = chain_backward.through(dz.reshape(-1, dz.shape[-1]), passed)
        dx = dx if dx is None else dx.view(shape).to(dtype)
        if around and not joins:
            assert dx is not None
            dx = dx.add_(dy)
        return dx, dy.to(residual_dtype) if needs[1] else None, None, None, *down


def _advance(
    steps: ChainPass,
    values: dict[int, Tensors],
    runs: list[StageRun],
    prepared: StageInput | None,
    epilogue: Epilogue | None,
) -> StageInput | None:
    """Take the next step, keeping of the boundaries behind it what is to be kept."""
    first = len(runs)
    before = runs[first - 1] if first else None
    done, following = steps.take(first, values[first], prepared, epilogue, before=before)
    for at, run in enumerate(done, first):
        if at and at not in steps.keep:
            del values[at]
        values[at + 1] = run.out
        runs.append(StageRun((), run.extra, run.note))
    return following


def _to_save(
    spec: ChainSpec,
    values: dict[int, Tensors],
    runs: list[StageRun],
    asked: Sequence[StageNeeds],
    given: Optional,  # gamma, mask and the operands
) -> Saved:
    if spec.lean:
        runs = [s.slim(run, own) for s, run, own in zip(spec.stages, runs, asked, strict=True)]
    kept, again = stored(spec, runs, asked)
    again &= ~_normed(spec, values, runs, asked, given[2:], again)
    flat = list(given)
    for i in kept:
        flat += values[i]
    for i, run in enumerate(runs):
        flat += () if again >> i & 1 else run.extra
    notes = [None if again >> i & 1 else (len(r.extra), r.note) for i, r in enumerate(runs)]
    return flat, (asked, [(i, len(values[i])) for i in kept], notes)


def _normed(
    spec: ChainSpec,
    values: dict[int, Tensors],
    runs: Sequence[StageRun],
    asked: Sequence[StageNeeds],
    operands: Sequence[Tensor | None],
    again: int,
) -> int:
    """A bit for each LayerNorm whose statistics are kept instead of running it again.

    Nobody reads its output but the stage behind, whose gradients form it of its input.
    """
    found = 0
    for i, stage in enumerate(spec.stages):
        before, there = i - 1, i == 1 or i - 1 in spec.keep
        if not (i and there and again >> before & 1) or again >> i & 1:
            continue
        norm = spec.stages[before].input_norm(runs[before], operands[spec.parts[before]])  # type: ignore[arg-type]
        given = (runs[i], operands[spec.parts[i]], asked[i])
        if norm and stage.norms(norm, values[before][0], *given):  # type: ignore[arg-type]
            found |= 1 << before
    return found


def _load(
    spec: ChainSpec, tensors: Sequence[Any], note: Any
) -> tuple[ChainBackward, Tensor | None]:
    asked, kept, notes = note
    first = 2 + spec.parts[-1].stop
    given, values, runs = tuple(tensors[:first]), {}, []
    for i, length in kept:
        values[i] = tuple(tensors[first : first + length])
        first += length
    for each in notes:
        length = each[0] if each else 0
        extra = tuple(tensors[first : first + length])
        runs.append(StageRun((), extra, each[1]) if each else None)
        first += length
    return ChainBackward(spec, values, runs, given[2:], asked), combined(given[:2])
