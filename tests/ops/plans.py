"""One plan for all problems, so that what is counted does not hang on a machine's speed."""

from __future__ import annotations

from fused_lora.types import Forward, Gradient, Keep, Plan

PLACES = ("fused_lora.ops.lora_linear.plan_for", "fused_lora.ops.lora_linear_many.plan_for")


def planned(forward: Forward):
    """A stand-in for ``plan_for``: ``forward`` both ways, rank-sized gradients, h kept."""

    def plan_for(m, k, n, spans, dtype, bias, needs, *_, **__):
        gradient = Gradient.RANK if needs.a or needs.b else Gradient.NONE
        keeps = needs.b and forward is not Forward.MERGE
        return Plan(forward, forward, gradient, Keep.HIDDEN if keeps else Keep.NOTHING)

    return plan_for


def fix_plans(monkeypatch, forward: Forward = Forward.SEPARATE) -> None:
    """``forward`` wherever a call is planned."""
    for place in PLACES:
        monkeypatch.setattr(place, planned(forward))
