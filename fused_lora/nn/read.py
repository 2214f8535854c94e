"""Adapters on a weight that others read without calling its module: w' = w + s b a at every read.

The frozen parameter stays where it is, under its key; only what a read of the attribute returns
changes, by a property of the class that the module is given. (``torch.nn.utils.parametrize`` puts
the same property there, but moves the parameter to a key of its own and cannot be pickled.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.config import AdapterConfig
from fused_lora.ops.lora_linear import without_autocast
from fused_lora.ops.lora_linear_checks import check_spans

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
        config = _without_dropout(AdapterConfig(**options))
        if type(linear) not in READABLE:
            raise TypeError(f"a {type(linear).__name__} cannot be adopted, {READABLE} can")
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
        return read

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # [N, K]
        """w', or the frozen weight where adapters are disabled."""
        if not self.adapter_enabled:
            return self._base[0] if self._base else self.base
        if self._base:
            self._refuse_training_merged()
            return self.base
        a, b = self._pairs()
        scales = self._scales if torch.compiler.is_compiling() else self.scales
        return read_weight(self.base, a, b, scales, self._spans)

    def _put_base(self, weight: Tensor) -> None:
        self._parameters["weight"] = cast(nn.Parameter, weight)  # setting it would read it

    def release(self) -> nn.Linear:
        """As ``AdaptedLinear.release``, back to the class it was."""
        was = self.__dict__.pop("_was")
        linear = super().release()
        linear.__class__ = was
        return linear


class FusedLoRAChild(FusedLoRARead):
    """The same for a bare parameter of another module, as its child: q|k|v of an attention.

    Its keys are its adapters' alone; the parameter stays its owner's.
    """

    @classmethod
    def attach(
        cls,
        owner: nn.Module,
        tensor: str,
        spans: Mapping[str, tuple[int, int]],
        rank: Mapping[str, int],
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> FusedLoRAChild:
        """Adapt ``owner``'s parameter ``tensor`` [N, K], which must end in ``_weight``."""
        config = _without_dropout(AdapterConfig(**options))
        child = cls.__new__(cls)
        nn.Module.__init__(child)
        child.__dict__["_home"] = (owner, tensor)  # a tuple: no submodule, no cycle of modules
        child.training = owner.training
        child.out_features, child.in_features = child.base.shape
        child.register_parameter("bias", None)
        child._attach(spans, rank, config, generator)
        check_spans(child._spans, child.out_features)
        name = child_name(tensor)
        if name in owner._modules or hasattr(type(owner), name):
            raise TypeError(f"{type(owner).__name__} has something else named {name!r}")
        owner._modules[name] = child
        tensors = getattr(type(owner), "_fused_lora_reads", ())
        owner.__class__ = reading(_plain(type(owner)), (*tensors, tensor))
        return child

    @property
    def base(self) -> Tensor:
        """The owner's parameter."""
        owner, tensor = self.__dict__["_home"]
        return owner._parameters[tensor]

    def _put_base(self, weight: Tensor) -> None:
        owner, tensor = self.__dict__["_home"]
        owner._parameters[tensor] = weight

    def release(self) -> nn.Module:  # type: ignore[override]
        """Leave the owner as it was; its parameter keeps w' if merged."""
        self.check_releasable()
        owner, tensor = self.__dict__["_home"]
        if self.merged:
            self.base.requires_grad_(self._base[0].requires_grad)
        del owner._modules[child_name(tensor)]
        left = tuple(t for t in type(owner)._fused_lora_reads if t != tensor)
        owner.__class__ = reading(_plain(type(owner)), left)
        return owner

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        base = own.pop(prefix + "weight", None)
        if base is not None:  # merged: the owner wrote w'
            owner, tensor = self.__dict__["_home"]
            destination[prefix.removesuffix(child_name(tensor) + ".") + tensor] = base
        destination.update(own)


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


def child_name(tensor: str) -> str:
    """``in_proj`` of ``in_proj_weight``."""
    return tensor.removesuffix("_weight")


def reading(plain: type[nn.Module], tensors: tuple[str, ...]) -> type[nn.Module]:
    """``plain``, but a read of ``tensors`` gives w'; ``plain`` itself for none."""
    return _made(plain, tensors) if tensors else plain  # type: ignore[arg-type]


@functools.cache
def _made(plain: Any, tensors: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: property(_reader(name)) for name in tensors}
    members |= {"_fused_lora_reads": tensors, "__reduce_ex__": _reduce, "__module__": __name__}
    return type(f"FusedLoRA{plain.__name__}", (plain,), members)


def _reader(tensor: str) -> Any:
    def read(owner: nn.Module) -> Tensor:
        child = owner._modules.get(child_name(tensor))
        return owner._parameters[tensor] if child is None else child.weight  # type: ignore

    return read


def _reduce(owner: nn.Module, _: int) -> tuple[Any, ...]:
    kind = type(owner)
    return _remake, (_plain(kind), kind._fused_lora_reads), owner.__dict__  # type: ignore


def _remake(plain: type[nn.Module], tensors: tuple[str, ...]) -> nn.Module:
    kind = reading(plain, tensors)
    return kind.__new__(kind)


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__mro__[1] if "_fused_lora_reads" in vars(kind) else kind


def _start(item: tuple[Any, ...]) -> int:
    return item[0].start


def _without_dropout(config: AdapterConfig) -> AdapterConfig:
    if config.dropout:
        raise ValueError(f"dropout {config.dropout} drops from x; a weight that is read has none")
    return config


def _forget(read: AdaptedLinear) -> None:
    for name in [name for name in read._parameters if name.startswith("lora_")]:
        del read._parameters[name]
    for name in ("config", "adapter_enabled", "_groups", "_spans", "_scales", "_base"):
        read.__dict__.pop(name, None)
