"""Adapters on a parameter of another module: in_proj_weight, kernels of convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_lora.nn.adapted import check_rank
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.linear_state import settle
from fused_lora.nn.stand_in import (
    Unscripted,
    as_one_node,
    made_weight,
    own_tensor,
    why_not_replaceable,
)
from fused_lora.nn.weight_adapter import (
    FusedLoRAWeight,
    check_weight_config,
    delete_frozen,
    keep_deleted,
    refuse_parametrized,
    refuse_read,
    set_frozen,
    writing_to,
)
from fused_lora.ops.lora_linear_plain import check_spans

# The module that owns the parameter is given a subclass of its class, in which the parameter's name
# reads w'.


class FusedLoRAParameter(FusedLoRAWeight):
    """Adapters on a parameter of another module, as its child: ``in_proj_weight`` of an attention.

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
    ) -> FusedLoRAParameter:
        """Adapt ``owner``'s parameter ``tensor`` [N, K], which must end in ``_weight``."""
        config = check_weight_config(AdapterConfig.of(cls.__name__, options))
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
        tensors = getattr(type(owner), "_fused_lora_weights", ())
        owner.__class__ = class_reading(_plain(type(owner)), (*tensors, tensor))
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
        left = tuple(t for t in type(owner)._fused_lora_weights if t != tensor)
        owner.__class__ = class_reading(_plain(type(owner)), left)
        return owner


def child_name(tensor: str) -> str:
    """``in_proj`` of ``in_proj_weight``; ``kernel`` of a convolution's ``weight``."""
    return "kernel" if tensor == "weight" else tensor.removesuffix("_weight")


def class_reading(plain: type[nn.Module], tensors: tuple[str, ...]) -> type[nn.Module]:
    """``plain``, but a read of ``tensors`` gives w'; ``plain`` itself for none."""
    return _made(plain, tensors) if tensors else plain  # type: ignore[arg-type]


@functools.cache
def _made(plain: Any, tensors: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _property(name) for name in tensors}
    members |= {"_fused_lora_weights": tensors, "__reduce_ex__": _reduce}
    members["__module__"] = plain.__module__  # torch.fx leaves modules of torch's whole
    members |= {"__setattr__": _set, "__delattr__": _delete, "register_parameter": _register}
    return type(f"FusedLoRA{plain.__name__}", (plain,), members)


def _property(tensor: str) -> property:
    def read(owner: nn.Module) -> Tensor:
        child, base = owner._modules.get(child_name(tensor)), own_tensor(owner, tensor)
        return base if child is None else child.read(base)  # type: ignore

    def write(owner: nn.Module, value: Tensor) -> None:
        set_frozen(owner, tensor, value)

    return property(read, write, lambda owner: delete_frozen(owner, tensor))


def _set(owner: Any, name: str, value: Any) -> None:
    if name == "parametrizations":
        refuse_parametrized(owner, *type(owner)._fused_lora_weights)
    nn.Module.__setattr__(owner, name, value)


def _register(owner: Any, name: str, param: nn.Parameter | None) -> None:
    refuse_read(owner, name, param)
    nn.Module.register_parameter(owner, name, param)


def _delete(owner: Any, name: str) -> None:
    if name in type(owner)._fused_lora_weights:
        keep_deleted(owner, name)
    nn.Module.__delattr__(owner, name)


def _reduce(owner: nn.Module, _: int) -> tuple[Any, ...]:
    kind = type(owner)
    return _remake, (_plain(kind), kind._fused_lora_weights), owner.__dict__  # type: ignore


def _remake(plain: type[nn.Module], tensors: tuple[str, ...]) -> nn.Module:
    kind = class_reading(plain, tensors)
    return kind.__new__(kind)


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__mro__[1] if "_fused_lora_weights" in vars(kind) else kind


# Adapters on a convolution's kernel: w' = w + s b a at every read, plainly, as its child.
#
#     w' = w + s (b a)        a [R, C k]   b [N, R]   w [N, C, ...], k the size of its window
#
# Convolutions are adapted where a LoraConfig names one, as PEFT's ``"proj"`` names the patch
# embedding. The kernel is small beside the images it slides over; nothing is fused.


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FusedLoRAConvWeight(FusedLoRAParameter):
    """a and b of a convolution, whose ``weight`` reads w'; the convolution stays what it is."""

    @classmethod
    def attach(  # type: ignore[override]
        cls, owner: nn.Module, rank: int, **options: Any
    ) -> FusedLoRAConvWeight:
        """Adapt the kernel of ``owner``; options are those of ``AdapterConfig``.

        Raises:
            TypeError: a convolution that cannot be, with the reason.
        """
        if why := why_not_kernel(owner):
            raise TypeError(f"the convolution to adapt: {why}")
        columns: Mapping[str, tuple[int, int]] = {"": (0, len(owner._parameters["weight"]))}  # type: ignore[arg-type]
        return cast(
            FusedLoRAConvWeight, super().attach(owner, "weight", columns, {"": rank}, **options)
        )

    @property
    def base(self) -> Tensor:
        """The frozen kernel as a matrix, [N, C k]."""
        return self._whole().flatten(1)

    def _whole(self) -> Tensor:
        return own_tensor(*self.__dict__["_home"])

    def _frozen(self) -> Tensor:
        return self._base[0].flatten(1) if self._base else self.base

    def _put_base(self, weight: Tensor) -> None:
        whole = self._whole()
        if weight.dim() != whole.dim():
            weight = nn.Parameter(weight.detach().view_as(whole), requires_grad=False)
        super()._put_base(weight)

    def _take_merged(self, merged: Tensor) -> None:
        self._base = (self._whole(),)
        self._put_base(merged)

    def read(self, base: Tensor) -> Tensor:
        """w' in the kernel's shape."""
        if not self.adapter_enabled or self._base:
            return super().read(base)
        return writing_to(self._formed(base.flatten(1)).view_as(base), base)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is one of torch's, adapted or not."""
    return isinstance(module, CONVOLUTIONS)


def why_not_kernel(conv: nn.Module) -> str | None:
    """Why PEFT's adapter of a convolution cannot be put into its kernel; None where it can."""
    if type(conv) not in CONVOLUTIONS:
        return f"a {type(conv).__name__}, no plain convolution of torch's"
    assert isinstance(conv, CONVOLUTIONS)
    if conv.groups != 1:
        return f"a {type(conv).__name__} of {conv.groups} groups"
    if any(step != 1 for step in conv.dilation) or conv.padding_mode != "zeros":
        return "dilation or padding that PEFT's adapter of it would not have"
    return why_not_replaceable(conv)


# FusedLoRAConv2d: an adapter on a convolution's kernel, for students that are no transformers.
#
#     w' = w + s (b a), y = conv(x, w')      a [R, C/g kh kw]   b [N, R]   w [N, C/g, kh, kw]
#
# The kernel is small beside the images it slides over, so the sum is made anew in each step: any
# stride, padding, dilation and groups are those of the frozen convolution, and no image-sized
# tensor is computed or kept for the adapter.


class FusedLoRAConv2d(Unscripted, nn.Conv2d):
    """An ``nn.Conv2d`` with one adapter on its kernel; made of a convolution by ``adopt``."""

    scale: float
    rank: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @classmethod
    def adopt(
        cls,
        conv: nn.Conv2d,
        rank: int,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> FusedLoRAConv2d:
        """``conv`` itself, from now on with an adapter; its frozen kernel keeps its identity.

        Raises:
            TypeError: ``conv`` is not exactly an ``nn.Conv2d``.
            ValueError: a rank below 1 or above what the kernel can express, a scale not finite.
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"expected a plain torch.nn.Conv2d, got {type(conv).__name__}")
        check_rank(rank, cls.__name__)
        n, k = conv.out_channels, conv.weight[0].numel()
        if rank > min(n, k):
            raise ValueError(f"rank {rank} is above min(channels, kernel) = min({n}, {k})")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        like = torch.empty(0, device=conv.weight.device, dtype=wide)
        a, b = nn.Parameter(like.new_empty(rank, k)), nn.Parameter(like.new_zeros(n, rank))
        if not a.is_meta:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        conv.weight.requires_grad_(False)
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.rank, conv.scale = rank, float(scale)
        conv.lora_A, conv.lora_B = a, b
        return conv

    def kernel(self) -> Tensor:
        """w' in the dtype of w, summed in fp32 or wider and rounded once."""
        with torch.autocast(self.weight.device.type, enabled=False):
            wide = torch.promote_types(self.weight.dtype, self.lora_A.dtype)
            flat = self.weight.flatten(1).to(wide)
            summed = torch.addmm(flat, self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scale)
            return summed.view_as(self.weight).to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """y [B, N, height', width'] of x [B, C, height, width]."""
        if isinstance(input, Proxy):
            return as_one_node(self, input, input)  # type: ignore[no-any-return]
        return self._conv_forward(input, self.kernel(), self.bias)

    def release(self, merge: bool = False) -> nn.Conv2d:
        """Become a plain ``nn.Conv2d`` again; ``merge`` keeps w', in a parameter of its own."""
        if merge:
            self.weight = nn.Parameter(self.kernel().detach(), requires_grad=False)
        del self.lora_A, self.lora_B, self.rank, self.scale
        self.__class__ = nn.Conv2d  # type: ignore[assignment]
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A checkpoint without any adapters loads strictly, as into an adapted linear."""
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        own = [f"{prefix}lora_A", f"{prefix}lora_B"]
        missing_keys += [key for key in missing if key not in own]
        settle(missing_keys, unexpected_keys, own, missing)

    def extra_repr(self) -> str:
        """The convolution's own line, then the adapter's."""
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"
