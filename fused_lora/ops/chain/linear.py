"""lora_linear as a stage: one or several frozen matrices, each with its adapters, on the same x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.interface import (
    Adapters,
    Epilogue,
    InputNorm,
    LowRank,
    PreviousLinear,
)
from fused_lora.ops import elementwise
from fused_lora.ops.chain.stage import (
    FREE,
    PLAIN,
    FormedGrads,
    GradEpilogue,
    Optional,
    Placement,
    Previous,
    Stage,
    StageGrads,
    StageInput,
    StageNeeds,
    StageRun,
    Tensors,
    consecutive,
    never,
)
from fused_lora.ops.epilogues import (
    plan_in_context,
    why_nobody,
    why_not_activated,
    why_not_activation_grad,
    why_not_fused,
    why_not_normed,
    why_not_previous,
)
from fused_lora.ops.lora_dropout import FORMS_H
from fused_lora.ops.lora_linear import (
    Frame,
    as_rows,
    call_plan,
    compute,
    input_grads,
    lora_linear,
)
from fused_lora.ops.planning import packed_with, problem, traits_of
from fused_lora.plan.strategies import fuses_activation, keeps_x
from fused_lora.types import NO_CONTEXT, Forward, FusionContext, Gradient, Impl, Keep, Needs, Plan


@dataclass(frozen=True)
class LinearStage(Stage):
    """Owns the operands of each frame in turn; extra is, for each, (kept, w as it was cast)."""

    frames: tuple[Frame, ...]
    dtype: torch.dtype
    context: FusionContext = NO_CONTEXT  # of each frame; what else lies beside shows in each pass
    keeps_h: bool = False  # gradients of a or b may be formed by who writes du or dy

    operands: int = field(init=False, compare=False)  # those of all frames
    parts: tuple[tuple[Frame, slice], ...] = field(init=False, compare=False)  # each one's own

    def __post_init__(self) -> None:
        slices = consecutive([frame.operands() for frame in self.frames])
        object.__setattr__(self, "operands", slices[-1].stop)
        object.__setattr__(self, "parts", tuple(zip(self.frames, slices, strict=True)))

    @property
    def drops(self) -> bool:
        """Whether adapters have dropout: h and dx then are formed apart."""
        return any(frame.dropout for frame in self.frames)

    @property
    def seeds(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each frame that has dropout."""
        return tuple(at for frame, part in self.parts for at in frame.seeds(part.start))

    def asked(self, x: bool, own: tuple[bool, ...]) -> tuple[Needs, ...]:
        """The gradients each frame is asked for."""
        return tuple(frame.needs(x, own[part]) for frame, part in self.parts)

    def forward(
        self, x: Tensors, own: Optional, asked: StageNeeds, place: Placement = FREE
    ) -> StageRun:
        """y [M, N] of x [M, K], for each frame; with an activation as its epilogue u, if stored."""
        ys, extra, plans = [], [], []
        prepared, epilogue = place.prepared, place.epilogue
        settled = prepared.plan if prepared else place.plan
        around = self.around(epilogue)
        placed = (epilogue, place.out, prepared and prepared.h)
        for i, (frame, part) in enumerate(self.parts):
            w, bias, *ab = own[part]
            assert w is not None
            plan = settled or self._plan(x[0], own, asked, around, i)
            given = (x[0], w, bias, frame, self.dtype, tuple(ab), asked.note[i])
            done = compute(*given, prepared and prepared.buffer, plan, *placed)  # type: ignore[arg-type]
            merged = frame.impl is not Impl.REFERENCE and done.plan.keep is Keep.MERGED
            reads_w = asked.note[i].x and not merged
            ys.append(done.y)
            extra += [done.kept, done.w if reads_w and done.w is not w else None]
            plans.append(done.plan)
        if place.epilogue is None or place.epilogue.activation == "none":
            return StageRun(tuple(ys), tuple(extra), tuple(plans))
        u = () if done.u is None else (done.u,)
        return StageRun(u, tuple(extra), tuple(plans), done.y)

    def epilogue(
        self, residual: Tensor | None, gamma: Tensor | None, mask: Tensor | None
    ) -> Epilogue | None:
        """LayerScale and residual, where an epilogue might serve: the plan decides."""
        if residual is None or mask is not None or len(self.frames) > 1 or self.drops:
            return None
        if why_nobody(residual, self.dtype, self.frames[0].impl):
            return None
        return Epilogue(factor=gamma, residual=residual.reshape(-1, residual.shape[-1]))

    def around(self, epilogue: Epilogue | None) -> FusionContext:
        """What of its context comes with an ``epilogue``."""
        if epilogue is None or epilogue.activation != "none":
            return NO_CONTEXT
        return FusionContext(joined=True, expanded=self._adds(epilogue))

    def _adds(self, epilogue: Epilogue) -> bool:
        """Whether the pass of a residual adds s h bT of the one frame as it reads y."""
        (frame, *others), z = self.frames, epilogue.residual
        if others or self.drops or z is None:
            return False
        rank = sum(span.rank for span in frame.spans)
        given = ("expand_residual", z, self.dtype, rank, epilogue.factor)
        return elementwise.why_not_expand(*given) is None

    def fuses(
        self,
        epilogue: Epilogue,
        x: Tensors,
        own: Optional,
        asked: StageNeeds,
        prepared: StageInput | None,
    ) -> Plan | None:
        """One product does, where an epilogue of its plan's serves."""
        plan = prepared.plan if prepared else self._plan(x[0], own, asked)
        if plan is None or not fuses_activation(plan):
            return None
        assert own[0] is not None
        given = (self.frames[0].spans, plan, epilogue, self.dtype)
        return None if why_not_fused(x[0], own[0], *given) else plan

    def _plan(
        self,
        like: Tensor,
        own: Optional,
        asked: StageNeeds,
        around: FusionContext = NO_CONTEXT,  # what the stage does not know of itself
        i: int = 0,
    ) -> Plan | None:
        """Of frame i, the plan that counts on what may be part of its passes; None: nothing may."""
        frame, part = self.parts[i]
        context = self._within(around)
        alone = context._replace(bordered=False, shrunk=False) == NO_CONTEXT
        if self.drops or alone or why_nobody(like, self.dtype, frame.impl):
            return None
        w, bias, *ab = own[part]
        assert w is not None
        traits = traits_of(ab, frame.scales)  # type: ignore[arg-type]
        question = (like, w, bias is not None, frame.spans, asked.note[i], traits, frame.impl)
        return plan_in_context(
            *question,
            self.dtype,
            context,
            self.keeps_h,
        )

    def _within(self, around: FusionContext) -> FusionContext:
        """``around``, with what the stage knows of itself."""
        activated, input_activated = self.context.activated, self.context.input_activated
        together = packed_with(self.context.packed_with)
        return around._replace(
            activated=activated, input_activated=input_activated, packed_with=together
        )

    def fuses_activation_grad(self, dy: Tensors, run: StageRun, own: Optional) -> bool:
        """Likewise in the plan of its backward."""
        frame, w = self.frames[0], own[0]
        if len(self.frames) > 1 or frame.impl is Impl.REFERENCE or self.drops:
            return False
        assert w is not None
        return why_not_activation_grad(dy[0], w, frame.spans, run.note[0], self.dtype) is None

    def opens(self, run: StageRun) -> bool:
        """As its plan has it."""
        return any(plan.dx is Forward.OPEN for plan in run.note)

    def activates(self, dy: Tensors, run: StageRun, own: Optional, asked: StageNeeds) -> bool:
        """As the compiled gradients of one frame do."""
        frame, needs, w = self.frames[0], asked.note[0], own[0]
        if len(self.frames) > 1 or frame.impl is Impl.REFERENCE or self.drops:
            return False
        assert w is not None
        return why_not_activated(dy[0], w, frame.spans, needs, run.note[0], self.dtype) is None

    def norms(
        self,
        norm: InputNorm,
        z: Tensor,
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
        formed: FormedGrads | None = None,
    ) -> bool:
        """As the compiled gradients of every frame do."""
        if self.drops:
            return False
        for (frame, part), needs, plan in zip(self.parts, asked.note, run.note, strict=True):
            w = own[part][0]
            assert w is not None
            if formed:
                needs, plan = self._left(z, own, needs, plan, formed)
            if frame.impl is Impl.REFERENCE:
                return False
            if why_not_normed(norm, z, w, frame.spans, needs, plan, self.dtype):
                return False
        return True

    def previous(self, run: StageRun, own: Optional, asked: StageNeeds) -> Previous | None:
        """Of one frame, where h was kept."""
        frame, needs, plan = self.frames[0], asked.note[0], run.note[0]
        if len(self.frames) > 1 or frame.impl is Impl.REFERENCE or self.drops or not needs.b:
            return None
        (kept, *_), (w, bias, *ab) = run.extra, own
        if plan.keep is not Keep.HIDDEN or kept is None or not needs.x:
            return None
        assert w is not None
        linear = PreviousLinear(kept, frame.adapters(ab))  # type: ignore[arg-type]
        traits = traits_of(ab, frame.scales)  # type: ignore[arg-type]
        n, k = w.shape
        call = (kept.shape[0], k, n, frame.spans, self.dtype, bias is not None, needs)
        question = problem(*call, self._alone(), traits, kept.device)
        rest = self._left(kept, own, needs, plan, FormedGrads(()))[1]
        return Previous(linear, question, plan, rest)

    def takes_previous(
        self,
        previous: Previous,
        kind: str,
        dy: Tensors,
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
    ) -> bool:
        """As Triton's dx or the kernel behind an open one does, beside the compiled gradients."""
        frame, (w, _, *ab) = self.frames[0], own
        assert w is not None
        traits = traits_of(ab, frame.scales)  # type: ignore[arg-type]
        given = (frame.spans, asked.note[0], run.note[0], self.dtype, traits)
        return why_not_previous(previous, kind, dy[0], w, *given) is None

    def _left(
        self, dy: Tensor, own: Optional, needs: Needs, plan: Plan, formed: FormedGrads
    ) -> tuple[Needs, Plan]:
        """What is left to do of the one frame, and its plan, where gradients of b are there.

        Gradients stay with whom they were: who forms a LayerNorm's output as it is read.
        """
        (frame,), (w, bias, *ab) = self.frames, own
        assert w is not None
        needs, traits = replace(needs, b=False), traits_of(ab, frame.scales)  # type: ignore[arg-type]
        question = (dy, w, bias is not None, frame.spans, needs, traits, Keep.NOTHING, frame.impl)
        opens, there = plan.dx is Forward.OPEN, formed.dh is not None
        context = self._alone()._replace(input_expanded=opens, hidden_grad=there)
        rest = call_plan(*question, self.dtype, context)
        if rest.gradient is Gradient.RANK and rest.grads_by is not plan.grads_by:
            rest = replace(rest, grads_by=plan.grads_by, writes_dh=False)
        return needs, rest

    def _alone(self) -> FusionContext:
        """With nothing beside the product."""
        return FusionContext(packed_with=packed_with(self.context.packed_with))

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
        epilogue: GradEpilogue = PLAIN,
    ) -> StageGrads:
        """dx [M, K], the sum over frames, or of one frame du; and the gradients of the operands."""
        rows = None if x is None else as_rows(x[0], self.dtype)
        dx: Tensor | None = None
        low_rank: LowRank | None = None
        down: list[Tensor | None] = []
        for i, ((frame, part), needs) in enumerate(zip(self.parts, asked.note, strict=True)):
            kept, cast = run.extra[2 * i : 2 * i + 2]
            w, _, *ab = own[part]
            assert w is not None
            w, dy_i = w.to(self.dtype) if cast is None else cast, as_rows(dy[i], self.dtype)
            plan, dh = run.note[i], None
            if formed := epilogue.formed:
                needs, plan = self._left(dy_i, own, needs, plan, formed)
                kept, dh = None, formed.dh
            given = (dy_i, rows, kept, w, frame, ab, needs, plan)
            activation_grad = (epilogue.activation_grad,) if epilogue.activation_grad else ()
            how: dict[str, Any] = dict(activation=epilogue.source, norm=epilogue.norm, dh=dh)
            found = input_grads(*given, *activation_grad, **how)
            if formed:
                found = found._replace(b=list(formed.b))
            if found.dh is not None:
                assert len(self.frames) == 1, self.frames
                low_rank = LowRank(found.dh, frame.adapters(ab))  # type: ignore[arg-type]
            down += frame.of_operands(found)
            dx = found.x if dx is None or found.x is None else dx.add_(found.x)
        return StageGrads(None if dx is None else (dx,), tuple(down), low_rank)

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """One lora_linear for each frame."""
        out = []
        for frame, part in self.parts:
            w, bias, *ab = own[part]
            assert w is not None
            a, b, scales, spans = frame.adapters(ab)  # type: ignore[arg-type]
            given = (x[0], w, bias, a, b, scales, spans)
            out.append(lora_linear(*given, impl=frame.impl, dropout=frame.dropout))
        return tuple(out)

    def prepared(
        self,
        like: Tensor,
        own: Optional,
        asked: StageNeeds,
        writes: bool,
        shrinks: Callable[[Adapters], bool],
        expands: Callable[[int], bool] = never,
        previous: tuple[Previous, str] | None = None,
        around: FusionContext = NO_CONTEXT,
    ) -> StageInput | None:
        """A bordered buffer, where one GEMM on it wins once x lies there at no cost; h, where the
        plan reads one apart from x; and a plan that counts on either, or leaves dh a to others."""
        if len(self.frames) > 1 or self.frames[0].impl is Impl.REFERENCE or self.drops:
            return None
        frame, w = self.frames[0], own[0]
        adapters = frame.adapters(own[2:])  # type: ignore[arg-type]
        by_kernels = frame.impl is not Impl.ATEN
        shrunk = by_kernels and shrinks(adapters)
        expanded = by_kernels and asked.note[0].x and (previous or expands(adapters.rank))
        if not (writes or shrunk or expanded):
            return None
        assert w is not None
        around = around._replace(shrunk=shrunk, input_expanded=bool(expanded))
        for bordered in (True, False) if writes else (False,):
            around = around._replace(bordered=bordered)
            plan = self._plan_for(like, own, asked, around, previous)
            if bordered and plan.forward is not Forward.BORDERED:
                continue
            made = adapters if shrunk and plan.forward in FORMS_H else None
            k, wide = w.shape[1], (like.shape[0], w.shape[1] + adapters.rank)
            buffer = like.new_empty(wide, dtype=self.dtype) if bordered else None
            opens = plan.dx is Forward.OPEN
            return StageInput(buffer, k, plan, made) if bordered or made or opens else None
        return None

    def _plan_for(
        self,
        like: Tensor,
        own: Optional,
        asked: StageNeeds,
        around: FusionContext,
        previous: tuple[Previous, str] | None,
    ) -> Plan:
        """The plan of one frame, given what the stages beside it do for it."""
        frame, w, (needs,) = self.frames[0], own[0], asked.note
        assert w is not None
        traits = traits_of(own[2:], frame.scales)  # type: ignore[arg-type]
        if (plan := self._plan(like, own, asked, around)) is None:
            question = (like, w, own[1] is not None, frame.spans, needs, traits, None, frame.impl)
            context = FusionContext(bordered=around.bordered, shrunk=around.shrunk)
            return call_plan(*question, self.dtype, context)
        if previous is None or plan.dx is not Forward.OPEN:
            return plan
        before, kind = previous
        given = (frame.spans, needs, plan, self.dtype, traits)
        if why_not_previous(before, kind, like, w, *given) is None:
            return plan
        return self._plan_for(like, own, asked, around._replace(input_expanded=False), None)

    def reads_input(self, run: StageRun, asked: StageNeeds) -> bool:
        """Whether some frame's gradients read x."""
        return any(map(_reads_x, self.frames, asked.note, run.note))

    def slim(self, run: StageRun, asked: StageNeeds) -> StageRun:
        """Without h, w' and casts of w, wherever x is there to make them again."""
        extra, plans = list(run.extra), list(run.note)
        for i, (frame, needs) in enumerate(zip(self.frames, asked.note, strict=True)):
            extra[2 * i + 1] = None
            if _reads_x(frame, needs, plans[i]):
                extra[2 * i], plans[i] = None, replace(plans[i], keep=Keep.NOTHING)
        return StageRun((), tuple(extra), tuple(plans))


def _reads_x(frame: Frame, needs: Needs, plan: Plan) -> bool:
    return frame.impl is Impl.REFERENCE or keeps_x(needs, plan)
