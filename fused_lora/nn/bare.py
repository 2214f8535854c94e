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
from fused_lora.nn.stand_in import made_weight, own_tensor
from fused_lora.nn.weight_read import keep_deleted, put, refuse_parametrized, refuse_read, take
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
        return own_tensor(*self.__dict__["_home"])

    def _put_base(self, weight: Tensor) -> None:
        owner, tensor = self.__dict__["_home"]
        owner._parameters[tensor] = weight

    def _refuse_made(self, action: str) -> None:
        if why := made_weight(*self.__dict__["_home"]):
            raise RuntimeError(f"{action}: {why}")

    def release(self) -> nn.Module:  # type: ignore[override]
        """Leave the owner as it was; its parameter keeps w' if merged."""
        self.check_releasable()
        owner, tensor = self.__dict__["_home"]
        if self.merged:
            own_tensor(owner, tensor).requires_grad_(self._base[0].requires_grad)
        del owner._modules[child_name(tensor)]
        left = tuple(t for t in type(owner)._fused_lora_reads if t != tensor)
        owner.__class__ = reading(_plain(type(owner)), left)
        return owner


def child_name(tensor: str) -> str:
    """``in_proj`` of ``in_proj_weight``; ``kernel`` of a convolution's ``weight``."""
    return "kernel" if tensor == "weight" else tensor.removesuffix("_weight")


def reading(plain: type[nn.Module], tensors: tuple[str, ...]) -> type[nn.Module]:
    """``plain``, but a read of ``tensors`` gives w'; ``plain`` itself for none."""
    return _made(plain, tensors) if tensors else plain  # type: ignore[arg-type]


@functools.cache
def _made(plain: Any, tensors: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _property(name) for name in tensors}
    members |= {"_fused_lora_reads": tensors, "__reduce_ex__": _reduce}
    members["__module__"] = plain.__module__  # torch.fx leaves modules of torch's whole
    members |= {"__setattr__": _set, "__delattr__": _delete, "register_parameter": _register}
    return type(f"FusedLoRA{plain.__name__}", (plain,), members)


def _property(tensor: str) -> property:
    def read(owner: nn.Module) -> Tensor:
        child, base = owner._modules.get(child_name(tensor)), own_tensor(owner, tensor)
        return base if child is None else child.read(base)  # type: ignore

    def write(owner: nn.Module, value: Tensor) -> None:
        put(owner, tensor, value)

    return property(read, write, lambda owner: take(owner, tensor))


def _set(owner: Any, name: str, value: Any) -> None:
    if name == "parametrizations":
        refuse_parametrized(owner, *type(owner)._fused_lora_reads)
    nn.Module.__setattr__(owner, name, value)


def _register(owner: Any, name: str, param: nn.Parameter | None) -> None:
    refuse_read(owner, name, param)
    nn.Module.register_parameter(owner, name, param)


def _delete(owner: Any, name: str) -> None:
    if name in type(owner)._fused_lora_reads:
        keep_deleted(owner, name)
    nn.Module.__delattr__(owner, name)


def _reduce(owner: nn.Module, _: int) -> tuple[Any, ...]:
    kind = type(owner)
    return _remake, (_plain(kind), kind._fused_lora_reads), owner.__dict__  # type: ignore


def _remake(plain: type[nn.Module], tensors: tuple[str, ...]) -> nn.Module:
    kind = reading(plain, tensors)
    return kind.__new__(kind)


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__mro__[1] if "_fused_lora_reads" in vars(kind) else kind
