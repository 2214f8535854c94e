"""FusedLoRALinear, one adapter on all of y, and its grouped form for a fused qkv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fused_lora.arguments import brief, by_string, whole
from fused_lora.nn.adapted import AdaptedLinear, check_adoptable
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.stand_in import rebind


class FusedLoRALinear(AdaptedLinear):
    """``nn.Linear`` with one adapter: y = x wT + bias + s (x aT) bT (Hu et al. 2021, equation 3).

    Args:
        in_features: K.
        out_features: N.
        bias: as in ``nn.Linear``.
        device: as in ``nn.Linear``.
        dtype: of the base weight; the adapters' is ``adapter_dtype``.
        rank: R, from 1 on; above min(K, N) it costs more than it can express.
        **options: the fields of ``AdapterConfig``.

    Raises:
        ValueError: an option out of range, with the value seen.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 8,
        **options: Any,
    ) -> None:
        config = AdapterConfig.of(type(self).__name__, options)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach({"": (0, out_features)}, {"": rank}, config)

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        rank: int = 8,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> FusedLoRALinear:
        """Turn ``linear`` itself into one of these: same object, same weight, hooks and all.

        ``generator`` draws the adapter's initial values; None stands for torch's global one.
        """
        config = AdapterConfig.of(cls.__name__, options)
        check_adoptable(linear, "the linear to adopt")
        return become(cls, linear, {"": (0, linear.out_features)}, {"": rank}, config, generator)


class FusedLoRAGroupedLinear(AdaptedLinear):
    """``nn.Linear`` with an adapter per named column range: a fused qkv with q, k and v apart.

    Args:
        in_features: K.
        out_features: N.
        bias: as in ``nn.Linear``.
        device: as in ``nn.Linear``.
        dtype: of the base weight.
        spans: group name to (first column, last column + 1); ranges may leave columns uncovered
            but not overlap.
        rank: one rank for all groups, or a mapping from group name to rank.
        **options: the fields of ``AdapterConfig``.

    Raises:
        ValueError: spans or options out of range, with the values seen.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spans: Mapping[str, tuple[int, int]],
        rank: int | Mapping[str, int] = 8,
        **options: Any,
    ) -> None:
        config = AdapterConfig.of(type(self).__name__, options)
        ranks = ranks_of(spans, rank, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach(spans, ranks, config)

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        spans: Mapping[str, tuple[int, int]],
        rank: int | Mapping[str, int] = 8,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> FusedLoRAGroupedLinear:
        """As ``FusedLoRALinear.adopt``, an adapter per column range."""
        config = AdapterConfig.of(cls.__name__, options)
        check_adoptable(linear, "the linear to adopt")
        ranks = ranks_of(spans, rank, linear.out_features)
        return become(cls, linear, spans, ranks, config, generator)


def ranks_of(
    spans: Mapping[str, tuple[int, int]], rank: int | Mapping[str, int], n: int
) -> dict[str, int]:
    """The rank of each group; raises ValueError for what does not fit ``n`` columns."""
    if not by_string("spans", spans):
        raise ValueError("spans names no group")
    for name, ends in spans.items():
        if not isinstance(ends, Sequence) or len(ends) != 2:
            raise ValueError(f"span {name!r} must be (start, stop), got {brief(ends)}")
        for end in ends:
            whole(f"span {name!r}: an end", end, 0)
    last = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if not name.isidentifier():
            raise ValueError(f"group names become parameter names: {name!r} is no identifier")
        if not last <= start < stop <= n:
            raise ValueError(
                f"span {name!r} = ({start}, {stop}) is empty, overlaps another, or leaves the "
                f"{n} output columns"
            )
        last = stop
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(spans, rank)
    if set(ranks) != set(spans):
        raise ValueError(f"ranks are given for {brief(list(ranks))}, spans for {sorted(spans)}")
    return ranks


def become(
    cls: type[Any],
    linear: nn.Linear,
    columns: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    config: AdapterConfig,
    generator: torch.Generator | None,
) -> Any:
    """``linear`` itself with adapters on, of class ``cls``; as it was where that fails."""
    kind, before = type(linear), dict(linear.__dict__)
    parameters = dict(linear._parameters)
    linear.__class__ = cls
    try:
        linear._attach(columns, ranks, config, generator)  # type: ignore[operator]
    except Exception:
        linear.__class__ = kind
        linear.__dict__.clear()
        linear.__dict__.update(before)
        linear._parameters.clear()
        linear._parameters.update(parameters)
        raise
    rebind(linear, kind)
    return linear
