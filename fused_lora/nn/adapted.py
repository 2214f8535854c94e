"""What every adapted linear shares: parameters, init, merged state, keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_lora.nn.config import CHANGES_BASE, AdapterConfig
from fused_lora.nn.inits import OF_WEIGHT, check_start, draw
from fused_lora.nn.variants import WithVariants, key_of
from fused_lora.ops.lora_expand import lora_add
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.sharded import is_sharded
from fused_lora.types import Span

Self = TypeVar("Self", bound="AdaptedLinear")
STATE = ("config", "adapter_enabled", "_groups", "_spans", "_scales", "_base", "_origin")


def check_rank(rank: int, where: str) -> None:
    """Raises ValueError unless ``rank`` is a whole number from 1 on."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{where}: rank must be a whole number from 1 on, got {rank!r}")


class AdaptedLinear(WithVariants):
    """An ``nn.Linear`` with one adapter (a, b) per named group of output columns.

    Parameters beyond the linear's own: ``lora_A`` [R, K] and ``lora_B`` [columns, R], with the
    suffix ``_<group>`` where groups are named; with the options ``mid`` and ``dora`` also
    ``lora_mid`` and ``lora_magnitude``. The base's state-dict keys stay as they are, and a
    checkpoint without adapter keys loads strictly.
    """

    config: AdapterConfig
    plain: type[nn.Linear] = nn.Linear  # what it was, and becomes on release
    around = False  # whether the base is computed by a forward of its own

    def _attach(
        self,
        columns: Mapping[str, tuple[int, int]],
        ranks: Mapping[str, int],
        config: AdapterConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        for name in columns:
            check_rank(ranks[name], type(self).__name__ + (name and f" {name}"))
        self.config = config
        self.adapter_enabled = True
        self._groups = tuple(columns)
        self._spans = tuple(Span(*columns[name], ranks[name]) for name in columns)
        scales = [config.scale_for(ranks[name]) for name in columns]
        self._scales = torch.tensor(scales, dtype=torch.float64, device="cpu")
        self._base: tuple[Tensor, ...] = ()  # the frozen weight, while merged
        self._origin: tuple[Tensor, ...] = ()  # the weight as it was, where the init changed it
        check_start(config.init, self.weight, self._spans, scales)
        for name, span in zip(self._groups, self._spans, strict=True):
            self.register_parameter(
                key_of("lora_A", name), self._empty(span.rank, self.in_features)
            )
            self.register_parameter(key_of("lora_B", name), self._empty(span.width, span.rank))
            self._register_variants(name, span)
        self.reset_adapters(generator)

    def _empty(self, *shape: int) -> nn.Parameter:
        device, dtype = self.weight.device, self.config.adapter_dtype
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    @property
    def groups(self) -> dict[str, Span]:
        """The span of each adapter, by group name."""
        return dict(zip(self._groups, self._spans, strict=True))

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor s of each adapter."""
        return tuple(self._scales.tolist())

    def set_scale(self, scale: float, group: str | None = None) -> None:
        """Change s of one adapter, or of all; compiled graphs see it without recompiling."""
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if group is not None and group not in self._groups:
            raise ValueError(f"no adapter named {group!r}; this module has {self._groups}")
        self._refuse_merged("set_scale")
        self._scales[slice(None) if group is None else self._groups.index(group)] = scale

    def reset_adapters(self, generator: torch.Generator | None = None) -> None:
        """Start a and b anew, as the ``init`` says: the module computes its base again."""
        self._refuse_merged("reset_adapters")
        if self._origin:
            self.weight = cast(nn.Parameter, self._origin[0])
            self._origin = ()
        if self.lora_parameters()[0].is_meta:
            return
        init = self.config.init
        if init in OF_WEIGHT:
            self._refuse_sharded("reset_adapters")
        for name, span, scale in zip(self._groups, self._spans, self.scales, strict=True):
            a, b = self.adapter(name)
            draw(init, self.weight[span.start : span.stop], a, b, scale, generator)
            if init == "svd":
                for half in (a, b):
                    half.requires_grad_(False)
        self._reset_variants()
        if init in CHANGES_BASE:
            self._take_from_base()

    def reset_parameters(self) -> None:
        """Draw everything anew, base and adapters, as is done after ``to_empty``."""
        attached = "_groups" in self.__dict__  # not yet, where nn.Linear's own __init__ calls
        if attached:
            self._refuse_merged("reset_parameters")
        super().reset_parameters()
        if attached:
            self.reset_adapters()

    def _refuse_merged(self, action: str) -> None:
        if self.merged:
            raise RuntimeError(f"{action}: the adapters are merged; unmerge() first")

    def adapter(self, group: str = "") -> tuple[nn.Parameter, nn.Parameter]:
        """(a [R, K], b [columns, R]) of one group."""
        if group not in self._groups:
            raise ValueError(f"no adapter named {group!r}; this module has {self._groups}")
        return getattr(self, key_of("lora_A", group)), getattr(self, key_of("lora_B", group))

    def adapters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(a, b) of every group, in order."""
        return list(zip(*self._pairs(), strict=True))  # type: ignore[arg-type]

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        a = [getattr(self, key_of("lora_A", name)) for name in self._groups]
        return a, [getattr(self, key_of("lora_B", name)) for name in self._groups]

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features]."""
        if not self.adapter_enabled:
            return F.linear(x, self._frozen(), self.bias)
        if self._base:
            self._refuse_training_merged()
            return F.linear(x, self.weight, self.bias)
        if not self.config.dora:
            return self._adapted(x, self.bias)
        y = self._adapted(x, None)
        y = y * self._output_factors().to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _adapted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        a, b = self._operands()
        scales, spans, config = self._scales, self._spans, self.config
        if self.training and config.dropout:
            y = F.linear(x, self.weight, bias)
            return lora_add(y, x, a, b, scales, spans, config.dropout)
        return lora_linear(x, self.weight, bias, a, b, scales, spans, impl=config.impl)

    def _refuse_training_merged(self) -> None:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapters are merged into the weight and would receive no gradient: call "
                "unmerge() to train, or eval() to evaluate"
            )

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds w' = w + s b a at the moment."""
        return bool(self._base)

    def merge(self, rounding: str = "nearest", seed: int = 0, impl: str = "auto") -> None:
        """Replace ``weight`` by w' = w + s b a; the frozen weight itself is kept aside, unchanged.

        Args:
            rounding: "nearest" or "stochastic" (16-bit weights; unbiased, by ``seed``).
            seed: key of the counter-based generator.
            impl: "auto", "aten", "reference", or "cuda" for the compiled kernel.
        """
        if self.merged:
            raise RuntimeError("merge: already merged")
        self._refuse_sharded("merge")
        base = self.weight
        with torch.no_grad():
            merged = self._merged(base, rounding, seed, impl)
        self._base = (base,)
        self.weight = nn.Parameter(merged, requires_grad=False)

    def _refuse_sharded(self, action: str) -> None:
        shape = (self.out_features, self.in_features)
        if is_sharded(self.weight) or tuple(self.weight.shape) != shape:
            raise RuntimeError(
                f"{action}: the weight is sharded over processes (FSDP), which would put it back: "
                f"{action} an unsharded copy of the model"
            )

    def unmerge(self) -> None:
        """Put the frozen weight back: the same parameter, the same bits."""
        if not self.merged:
            raise RuntimeError("unmerge: not merged")
        self.weight = self._base[0]
        self._base = ()

    def release(self) -> nn.Linear:
        """Become a plain ``nn.Linear`` again, dropping the adapters; keeps w' if merged."""
        self.check_releasable()
        if self.merged:
            self.weight.requires_grad_(self._base[0].requires_grad)
        elif self._origin:
            self.weight = cast(nn.Parameter, self._origin[0])
        for name in [name for name in self._parameters if name.startswith("lora_")]:
            del self._parameters[name]
        for name in STATE:
            del self.__dict__[name]
        self.__class__ = self.plain  # type: ignore[assignment]
        return self

    def check_releasable(self) -> None:
        """Raises RuntimeError where ``release`` would lose something."""
        self._refuse_sharded("release")
        if is_parametrized(self):
            raise RuntimeError(
                f"release: {sorted(self.parametrizations)} are parametrized: call "  # type: ignore[arg-type]
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        aside = {name: self.__dict__[name] for name in ("_base", "_origin") if self.__dict__[name]}
        for name, (weight,) in aside.items():  # moved as any parameter is, in place if it can
            self._parameters[name] = weight
        try:
            return super()._apply(fn, recurse)
        finally:
            for name in aside:
                self.__dict__[name] = (cast(nn.Parameter, self._parameters.pop(name)),)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # keys mean the same whether merged or not
            (base,) = self._base
            destination[prefix + "weight"] = base if keep_vars else base.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            error_msgs.append(f"{prefix[:-1]} is merged: call unmerge() before loading into it")
            return
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        own = {prefix + name for name in self._parameters if name.startswith("lora_")}
        vanilla = own.issubset(missing)
        if vanilla and self._origin:
            error_msgs.append(
                f"{prefix[:-1]} was started by init={self.config.init!r}, whose base is not the "
                "checkpoint's: load the checkpoint first, then patch"
            )
        missing_keys += [key for key in missing if not (vanilla and key in own)]

    def extra_repr(self) -> str:
        """The linear's own line, then the adapters'."""
        adapters = ", ".join(f"{name or 'rank'}={span.rank}" for name, span in self.groups.items())
        scale = ", ".join(f"{s:g}" for s in self.scales)
        state = ", merged" * self.merged + ", disabled" * (not self.adapter_enabled)
        return f"{super().extra_repr()}, {adapters}, scale={scale}{state}"


def check_adoptable(linear: nn.Module, where: str) -> nn.Linear:
    """``linear`` itself; raises TypeError unless it is exactly an ``nn.Linear``."""
    if isinstance(linear, AdaptedLinear):
        raise TypeError(f"{where} already carries adapters ({type(linear).__name__})")
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"{where} is a {type(linear).__module__}.{type(linear).__name__}, not a plain "
            "torch.nn.Linear: its own forward would be lost; keep_forward=True keeps it and adds "
            "the adapters to its result"
        )
    if is_traceable_wrapper_subclass(linear.weight):
        raise TypeError(
            f"{where}.weight is a {type(linear.weight).__name__}, not a plain tensor: "
            "keep_forward=True leaves it alone and adds the adapters to the linear's result"
        )
    return linear
