"""A live PEFT model: its LoRA layers compute fused passes, in place; the rest stays PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from fused_lora.nn.peft_linear import classes, why_not
from fused_lora.nn.stand_in import rebind
from fused_lora.ops.planning import expected, problem, traits_of
from fused_lora.patching.observe import ObservedWeight, observe
from fused_lora.patching.report import IN_WEIGHT, PatchError, PatchReport, ProjectionRow
from fused_lora.patching.rules import FoundProjection, find
from fused_lora.types import Needs, Span


def layers_of(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by dotted name; none where PEFT was never imported."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def fused_layers(model: nn.Module) -> dict[str, Any]:
    """Those of them that are fused already."""
    layers = layers_of(model)
    return {name: m for name, m in layers.items() if isinstance(m, classes())} if layers else {}


def patch_live(
    model: nn.Module, given: Mapping[str, Any], example: Any, batch_size: int
) -> PatchReport:
    """Fuse the LoRA layers that can be; ``given`` are the options set, which there can be none of.

    Raises:
        PatchError: an option was set, no layer can be fused, or the model is patched already.
    """
    if given:
        name, value = next(iter(given.items()))
        raise PatchError(
            f"{name}={value!r}: the model carries PEFT's adapters already, which are served as "
            "they are; give example_input and batch_size alone"
        )
    if fused := fused_layers(model):
        raise PatchError(f"already patched: {next(iter(fused))} computes fused passes; unpatch it")
    layers = layers_of(model)
    left = {name: reason for name, layer in layers.items() if (reason := why_not(layer))}
    found = [FoundProjection(n, m.base_layer, ()) for n, m in layers.items() if n not in left]
    if not found:
        raise PatchError(f"no layer of PEFT's can be fused: {_listed(left)}")
    observations = observe(model, found, example)
    for name, observed in observations.items():
        if not (observed.called or observed.read):
            left[name] = "neither called nor read by the model's forward: PEFT trains nothing there"
    served = {n: m for n, m in layers.items() if n not in left}
    report = _report(model, served, observations, left, batch_size)
    called, read = classes()
    for name, layer in served.items():
        was = type(layer)
        layer.__class__ = read if observations[name].read else called
        rebind(layer, was)
    return report


def release_live(model: nn.Module) -> bool:
    """Give PEFT its layers back; whether there were any."""
    layers = fused_layers(model)
    if not layers:
        return False
    from peft.tuners.lora.layer import Linear

    for layer in layers.values():
        was = type(layer)
        layer.__class__ = Linear
        rebind(layer, was)
    return True


def _report(
    model: nn.Module,
    served: Mapping[str, Any],
    observations: Mapping[str, ObservedWeight],
    left: dict[str, str],
    batch_size: int,
) -> PatchReport:
    roles = {each.name: "|".join(role.value for role in each.roles) for each in find(model)}
    rows = [
        _row(name, layer, roles.get(name, "-"), observations[name], batch_size)
        for name, layer in served.items()
    ]
    rows_per_image = {name: observations[name].rows for name in served}
    more = {"left_alone": left, "rows_per_image": rows_per_image}
    return PatchReport.of(model, rows, batch_size, **more)


def _row(
    name: str, layer: Any, role: str, observed: ObservedWeight, batch_size: int
) -> ProjectionRow:
    n, k = layer.base_layer.weight.shape
    ranks = tuple(layer.r[each] for each in layer.lora_A)
    halves = [half[each].weight for half in (layer.lora_A, layer.lora_B) for each in layer.lora_A]
    plan = IN_WEIGHT if observed.read else _plan(layer, observed.rows * batch_size)
    return ProjectionRow(name, role, k, n, ranks, sum(p.numel() for p in halves), plan)


def _plan(layer: Any, rows: int) -> str:
    """For the active adapters, as they stand now."""
    w = layer.base_layer.weight
    rank = sum(layer.r[name] for name in layer.active_adapters if name in layer.r)
    if not rank:
        return "PEFT's own: no adapter is active"
    spans = (Span(0, w.shape[0], rank),)
    bias = layer.base_layer.bias is not None
    question = (rows, w.shape[1], w.shape[0], spans, w.dtype, bias, Needs())
    first = next(name for name in layer.active_adapters if name in layer.r)
    traits = traits_of([layer.lora_A[first].weight], [layer.scaling[first]])
    asked = problem(*question, traits=traits, device=w.device)
    return str(expected(asked, w.dtype, w.device))


def _listed(left: Mapping[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(left.items())[:3]]
    return "; ".join(shown) + (f"; and {len(left) - 3} more" if len(left) > 3 else "")
