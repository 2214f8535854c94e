"""Adapters added to the result of a linear with a forward of its own: y = forward(x) + s h bT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_lora.arguments import brief
from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.linear import become, ranks_of
from fused_lora.nn.stand_in import as_one_node, bound_forward, made_weight, offloaded
from fused_lora.ops.lora_expand import lora_add
from fused_lora.ops.lora_linear_plain import DTYPES
from fused_lora.ops.operand import is_sharded

# For bases that hold no matrix one could read (8 or 4 bits, fp8): their class stays, as the parent
# of a class made here, and so do their forward, their state and their keys.


class AdditiveLoRALinear(AdaptedLinear):
    """The adapters' side of the classes that ``adopt_additive`` makes."""

    additive = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out_features] of x [..., in_features], by whatever name the linear knows it."""
        (x,) = (*args, *kwargs.values())
        if isinstance(x, Proxy):
            return as_one_node(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        if self._base:
            if not self.adapter_enabled:
                return self._own(x, self._base[0])
            self._refuse_training_merged()
        y = super(AdaptedLinear, self).forward(*args, **kwargs)  # the linear's own
        if self._base or not self.adapter_enabled:
            return y
        dropout = self.config.dropout if self.training else 0.0
        return lora_add(y, x, *self._operands(), self._scales, self._used, dropout)

    def _own(self, x: Tensor, weight: Tensor) -> Tensor:
        """The linear's own forward with ``weight`` in its weight's place."""
        now = self._parameters["weight"]
        self._parameters["weight"] = cast(nn.Parameter, weight)
        try:
            return super(AdaptedLinear, self).forward(x)
        finally:
            self._parameters["weight"] = now

    def check_mergeable(self) -> None:
        """Raises RuntimeError where w' in the weight's place would not compute w + s b a.

        An ordinary weight is held to it on a few numbers: a change d of it must add x dT.
        """
        super().check_mergeable()
        w, name = self._parameters.get("weight"), self.plain.__name__
        whole = (self.out_features, self.in_features)
        if type(w) is not nn.Parameter or w.dtype not in DTYPES or tuple(w.shape) != whole:
            raise RuntimeError(
                f"merge: a {name} computes with a weight of its own making ({_looks(w)}); take it "
                "out of its quantised form first"
            )
        if not w.is_meta and (why := self._why_not_linear_in(w)):
            raise RuntimeError(f"merge: the forward of a {name} {why}: unmerged it is right")

    @torch.no_grad()
    def _why_not_linear_in(self, w: Tensor) -> str | None:
        draw = torch.Generator("cpu").manual_seed(0)
        x, d = (torch.randn(n, w.shape[1], generator=draw).to(w) for n in (4, w.shape[0]))
        training, self.training = self.training, False
        try:
            off = max(self._off(x, w, d * size) for size in (float(w.std()), 1.0))
        except Exception as error:
            return f"could not be asked ({type(error).__name__}: {error})"
        finally:
            self.training = training
        if off <= (0.05 if w.dtype.itemsize == 2 else 2e-3):  # y's own rounding, TF32 included
            return None
        return f"adds something else than x dT for a change d of its weight (off by {off:.1e})"

    def _off(self, x: Tensor, w: Tensor, d: Tensor) -> float:
        moved = self._own(x, nn.Parameter(w + d, requires_grad=False))
        moved = moved.double() - self._own(x, w).double()
        expected = x.double() @ ((w + d).double() - w.double()).T
        return float((moved - expected).norm() / expected.norm())

    def _refuse_sharded(self, action: str) -> None:
        if is_sharded(self.base):
            raise RuntimeError(f"{action}: the weight is sharded over processes (FSDP)")

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.plain,), self.__dict__.copy()


CLASSES: dict[type[nn.Linear], type[AdditiveLoRALinear]] = {}  # by the class that stays the parent


def additive_class(plain: type[nn.Linear]) -> type[AdditiveLoRALinear]:
    """The class of a ``plain`` that carries adapters."""
    if plain not in CLASSES:
        body = {"plain": plain, "__doc__": plain.__doc__, "__module__": __name__}
        CLASSES[plain] = type(f"Additive{plain.__name__}", (AdditiveLoRALinear, plain), body)
    return CLASSES[plain]


def _new(plain: type[nn.Linear]) -> AdditiveLoRALinear:
    kind = additive_class(plain)
    return kind.__new__(kind)


def adopt_additive(
    linear: nn.Linear,
    rank: int | Mapping[str, int] = 8,
    spans: Mapping[str, tuple[int, int]] | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> AdditiveLoRALinear:
    """Add adapters to what the forward of ``linear``, of any subclass, computes; same object.

    Args:
        linear: its own forward goes on computing the base.
        rank: one for all groups, or by group name.
        spans: the columns of each named group; None for one adapter on all of y.
        generator: draws the initial values.
        **options: fields of ``AdapterConfig``; those that read the base weight are refused.

    Raises:
        TypeError: no ``nn.Linear``, or one that carries adapters.
        ValueError: an option out of range, or one that reads the base weight.
    """
    config = AdapterConfig.of("adopt_additive", options)
    if not isinstance(linear, nn.Linear) or isinstance(linear, AdaptedLinear):
        raise TypeError(f"linear: expected an nn.Linear without adapters, got {brief(linear)}")
    if why := why_not_additive(linear):
        raise TypeError(f"the linear to adopt: {why}")
    if config.dora or config.init not in ("kaiming", "gaussian", "orthogonal"):
        read = "dora" if config.dora else f"init={config.init!r}"
        raise ValueError(f"{read} reads the base weight, which {type(linear).__name__} hides")
    if config.base_dtype:
        raise ValueError(
            f"base_dtype={config.base_dtype!r} quantises the base weight, which "
            f"{type(linear).__name__} hides"
        )
    if spans is None:
        columns, ranks = {"": (0, linear.out_features)}, {"": rank}
    else:
        ranks = ranks_of(spans, rank, linear.out_features)  # type: ignore[assignment]
        columns = dict(spans)
    return become(additive_class(type(linear)), linear, columns, ranks, config, generator)  # type: ignore[arg-type]


def _looks(weight: Tensor | None) -> str:
    if weight is None:
        return "no parameter"
    return f"a {type(weight).__name__} of {weight.dtype}, {list(weight.shape)}"


def why_not_additive(linear: nn.Module) -> str | None:
    """Why adapters cannot even be added to the result of the linear's own forward."""
    return bound_forward(linear) or offloaded(linear) or made_weight(linear)


def hides_weight(linear: nn.Module) -> bool:
    """Whether ``linear`` is an ``nn.Linear`` whose weight is no matrix that one could read."""
    if not isinstance(linear, nn.Linear):
        return False
    return type(linear) is not nn.Linear or is_traceable_wrapper_subclass(linear.weight)


@contextmanager
def with_plain_weights(linears: Iterable[nn.Module]) -> Iterator[None]:
    """Within, each has a plain weight and forward: for a trial forward on the meta device."""
    weights = {
        linear: linear.weight
        for linear in linears
        if isinstance(linear, nn.Linear) and hides_weight(linear)
    }
    for linear in weights:
        matrix = torch.empty(linear.out_features, linear.in_features, device="meta")
        linear.__dict__["forward"] = partial(_plainly, linear)
        linear._parameters["weight"] = nn.Parameter(matrix, requires_grad=False)
    try:
        yield
    finally:
        for linear, weight in weights.items():
            linear._parameters["weight"] = cast(nn.Parameter, weight)
            del linear.__dict__["forward"]


def _plainly(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.to(linear.weight.dtype), linear.weight).to(x.dtype)
