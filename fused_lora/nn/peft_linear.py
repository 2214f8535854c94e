"""PEFT's own LoRA linear, its forward computed by ``lora_linear``; everything else stays PEFT's.

    y = x wT + bias + sum_i s_i (x a_iT) b_iT     over the active adapters i

Several active adapters are one of stacked rank: a = [a_1; a_2], b = [s_1 b_1, s_2 b_2]. What this
cannot compute, PEFT computes: merged or disabled adapters, one adapter per sample, dropout that
drops, variants, hooks on the inner modules, inner modules that others put there. All of it is asked
at each call. PEFT is imported by the functions that need it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_lora.nn.stand_in import (
    Unscripted,
    as_one_node,
    bound_forward,
    made_weight,
    odd_weight,
    refuse_constant,
    why_not_replaceable,
    why_watched,
)
from fused_lora.nn.weight_adapter import adapted_weight
from fused_lora.ops.lora_linear import autocasts, lora_linear
from fused_lora.ops.lora_linear_plain import DTYPES
from fused_lora.types import Span

CLASSES = ("FusedPeftLinear", "FusedPeftWeight")


def __getattr__(name: str) -> type[nn.Module]:
    if name in CLASSES:  # where pickle looks for them
        return classes()[CLASSES.index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """PEFT's ``Linear`` with a fused forward, and one whose ``weight``, when read, is w' too."""
    from peft.tuners.lora.layer import Linear

    class FusedPeftLinear(Unscripted, Linear):
        unscripted_cure = "call merge_and_unload() first"

        def _get_name(self) -> str:
            return "Linear"  # PEFT tells modules apart by what they print

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            names = () if args or _says(kwargs) else usable(self, x)
            if not names and isinstance(x, Proxy):
                return as_one_node(self, x, x, *args, **kwargs)  # type: ignore[no-any-return]
            if not names:
                return super().forward(x, *args, **kwargs)
            base: Any = self.base_layer
            a, b, s = _stacked(self, names)
            return lora_linear(x, base.weight, base.bias, [a], [b], [s])

    class FusedPeftWeight(FusedPeftLinear):
        @property
        def weight(self) -> Tensor:
            base: Any = self.base_layer
            w = base.weight
            names = usable(self, None)
            if not names:
                return w
            refuse_constant("w + s b a, an adapted weight,")
            a, b, s = _stacked(self, names)
            return adapted_weight(w, [a], [b], [s], [Span(0, w.shape[0], len(a))])

    for kind in (FusedPeftLinear, FusedPeftWeight):
        kind.__module__, kind.__qualname__ = __name__, kind.__name__
    return FusedPeftLinear, FusedPeftWeight


def why_not(layer: nn.Module) -> str:
    """Why PEFT goes on computing ``layer``; empty where it can be fused."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear:
        return f"a {type(layer).__module__}.{type(layer).__name__}, not PEFT's plain lora.Linear"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}"
    if base.weight.dtype not in DTYPES:
        return f"its weight is {base.weight.dtype}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    if why := bound_forward(layer) or why_not_replaceable(base):
        return f"it cannot be stood in for: {why}"
    reasons = (_why_not_adapter(layer, name) for name in layer.lora_A)
    return next((reason for reason in reasons if reason), "")


def _why_not_adapter(layer: Any, name: str) -> str:
    if variant := layer.lora_variant.get(name):
        kind = variant if isinstance(variant, type) else type(variant)
        return f"adapter {name!r} is PEFT's {kind.__name__}"
    if layer.lora_bias.get(name):
        return f"adapter {name!r} has a bias (lora_bias)"
    for half in (layer.lora_A[name], layer.lora_B[name]):
        if type(half) is not nn.Linear:
            return f"adapter {name!r} has a {type(half).__name__} where a Linear was expected"
        if half.bias is not None:
            return f"adapter {name!r} has a bias"
        if why := made_weight(half) or odd_weight(half._parameters.get("weight")):
            return f"adapter {name!r}: {why}"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor) and (scaling.numel() != 1 or scaling.dim() > 1):
        return f"adapter {name!r} has a scaling of shape {list(scaling.shape)}"
    return ""


def usable(layer: Any, x: Tensor | None) -> tuple[str, ...]:
    """The active adapters, if a fused call on ``x`` computes what PEFT would; else none."""
    if layer.disable_adapters or layer.merged:
        return ()
    names = tuple(name for name in layer.active_adapters if name in layer.lora_A)
    if any(_why_not_adapter(layer, name) for name in names):
        return ()
    halves = (layer.lora_A, layer.lora_B, layer.lora_dropout)
    inner = (half[name] for half in halves for name in names)
    if x is None:
        return names
    if any(_drops(layer.lora_dropout[name]) for name in names):
        return ()
    return () if _hooked((layer.base_layer, *inner)) or not _fits(layer.base_layer, x) else names


def _fits(base: nn.Linear, x: Tensor) -> bool:
    """Where it does not, torch's own error is the right one, or the base's own forward."""
    weight = base._parameters.get("weight")
    if type(base) is not nn.Linear or weight is None or odd_weight(weight):
        return False  # converted since, as to float8, or its weight is made by a hook
    return isinstance(x, Tensor) and (autocasts(x) or x.dtype is weight.dtype)


def _hooked(modules: Iterable[nn.Module]) -> bool:
    """Hooks of every kind, global ones too, and forwards bound to an instance."""
    return why_watched(*modules) is not None


def _says(kwargs: dict[str, Any]) -> bool:
    return any(value is not None for value in kwargs.values())


def _drops(dropout: nn.Module) -> bool:
    """Whether h is of another x; by the module's own mode, whatever the layer's is."""
    if type(dropout) is nn.Dropout:
        return dropout.training and dropout.p > 0
    return type(dropout) is not nn.Identity


def _stacked(layer: Any, names: tuple[str, ...]) -> tuple[Tensor, Tensor, float]:
    """(a [sum R, K], b [N, sum R], s); the parameters themselves where there is one adapter.

    A scaling that is a tensor, as PEFT's hotswapping makes it, goes into b: it may lie on any
    device, change under ``torch.compile``, and train.
    """
    a = [layer.lora_A[name].weight for name in names]
    b = [layer.lora_B[name].weight for name in names]
    if len(names) == 1 and not isinstance(layer.scaling[names[0]], Tensor):
        return a[0], b[0], float(layer.scaling[names[0]])
    scaled = [layer.scaling[name] * half for name, half in zip(names, b, strict=True)]
    return torch.cat(a), torch.cat(scaled, dim=1), 1.0
