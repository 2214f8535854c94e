"""Adapters on a bare parameter of another module: q|k|v of torch's own attention.

The module that owns it is given a subclass of its class, in which the parameter's name reads w'.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.read import FusedLoRARead, without_x
from fused_lora.ops.lora_linear_checks import check_spans


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
        config = without_x(AdapterConfig(**options))
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
