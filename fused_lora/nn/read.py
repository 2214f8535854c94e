"""Adapters on a weight that others read without calling its module: w' = w + s b a at every read.

The frozen parameter stays where it is, under its key; only what a read of the attribute returns
changes, by a property of the class that the module is given. (``torch.nn.utils.parametrize`` puts
the same property there, but moves the parameter to a key of its own and cannot be pickled.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fused_lora.nn.adapted import STATE, AdaptedLinear
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.graph_tools import refuse_constant
from fused_lora.nn.stand_in import rebind, why_not_stood_in
from fused_lora.nn.weight_read import (
    keep_deleted,
    put,
    refuse_parametrized,
    refuse_read,
    take,
    watched,
)
from fused_lora.ops.lora_linear_checks import check_spans
from fused_lora.programs.run import without_autocast

READABLE = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class FusedLoRARead(AdaptedLinear):
    """An ``nn.Linear`` whose ``weight``, read by anybody, is w' = w + s b a, with its gradients.

    Called as a module, it computes as ``FusedLoRALinear`` does. Dropout cannot be served: there is
    no x to drop from.
    """

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        spans: Mapping[str, tuple[int, int]],
        rank: Mapping[str, int],
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> FusedLoRARead:
        """Turn ``linear`` itself into one of these; ``spans`` of {"": (0, N)} for one adapter."""
        config = without_x(AdapterConfig(**options))
        if type(linear) not in READABLE:
            raise TypeError(f"a {type(linear).__name__} cannot be adopted, {READABLE} can")
        if why := why_not_stood_in(linear):
            raise TypeError(f"the linear to adopt: {why}")
        was = type(linear)
        linear.__class__ = cls
        read = cast(FusedLoRARead, linear)
        try:
            read._attach(spans, rank, config, generator)
            check_spans(read._spans, read.out_features)
        except Exception:
            _forget(read)
            linear.__class__ = was
            raise
        read.__dict__["_was"] = was
        rebind(linear, was)
        return read

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # [N, K]
        """w', or the frozen weight, to which writes go, where adapters are disabled."""
        return self.read(self.base)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        put(self, "weight", value)

    @weight.deleter
    def weight(self) -> None:
        take(self, "weight")

    def read(self, base: Tensor) -> Tensor:
        """w' of the frozen weight that stands in ``base``."""
        if not self.adapter_enabled:
            return self._base[0] if self._base else base
        if self._base:
            self._refuse_training_merged()
            return base
        return watched(self._formed(base), base)

    def _formed(self, w: Tensor) -> Tensor:  # [N, K]
        refuse_constant("w + s b a, an adapted weight,")
        a, b = self._operands()
        scales = self._scales if torch.compiler.is_compiling() else self.scales
        return read_weight(w, a, b, scales, self._used)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``'s; but w' is no parameter, whatever takes it for one."""
        refuse_read(self, name, param)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations":
            refuse_parametrized(self, "weight")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            keep_deleted(self, name)
        super().__delattr__(name)

    def _put_base(self, weight: Tensor) -> None:
        self._parameters["weight"] = cast(nn.Parameter, weight)  # setting it would read it

    def release(self) -> nn.Linear:
        """As ``AdaptedLinear.release``, back to the class it was."""
        was = self.__dict__.pop("_was")
        linear = super().release()
        linear.__class__ = was
        rebind(linear, nn.Linear)
        return linear


def read_weight(
    w: Tensor,  # [N, K]
    a: list[Tensor],  # G of [R_g, K]
    b: list[Tensor],  # G of [N_g, R_g]
    scales: Any,  # G numbers
    spans: Any,  # G, apart
) -> Tensor:
    """w' [N, K] in w's dtype, formed in fp32 or wider and rounded once; differentiable."""
    wide = torch.promote_types(w.dtype, torch.float32)
    pieces, last = [], 0
    with without_autocast(w.device):
        for span, a_g, b_g, s in sorted(zip(spans, a, b, scales, strict=True), key=_start):
            rows = w[span.start : span.stop].to(wide) + s * (b_g.to(wide) @ a_g.to(wide))
            pieces += [w[last : span.start], rows.to(w.dtype)]
            last = span.stop
        return torch.cat([*pieces, w[last:]])


def _start(item: tuple[Any, ...]) -> int:
    return item[0].start


def without_x(config: AdapterConfig) -> AdapterConfig:
    """``config``; raises ValueError for options that act on x or y, which a read never sees."""
    if config.dora:
        raise ValueError("dora scales y; a weight that is read has none")
    if config.dropout:
        raise ValueError(f"dropout {config.dropout} drops from x; a weight that is read has none")
    if config.base_dtype:
        raise ValueError(
            f"base_dtype={config.base_dtype!r} quantises x; a weight that is read has none"
        )
    return config


def _forget(read: AdaptedLinear) -> None:
    for name in [name for name in read._parameters if name.startswith("lora_")]:
        del read._parameters[name]
    for name in STATE:
        read.__dict__.pop(name, None)
