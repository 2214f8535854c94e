"""Adapters in a weight that others read without a call: w' = w + s b a at every read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fused_lora.nn.adapted import STATE, AdaptedLinear
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.stand_in import rebind, refuse_constant, why_not_replaceable
from fused_lora.ops.lora_linear_plain import check_spans
from fused_lora.programs.run import transformed, without_autocast

# A read of the attribute gives w' = w + s b a, a tensor made for one use; a write into that would
# be lost. So in eager mode w' and its views know w: writing in place (``nn.init``, ``copy_``,
# ``.data = ``) writes w, as it does on a linear that is called.


VIEWS = frozenset({
    "reshape", "view", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t",
    "unbind", "chunk", "split", "tensor_split", "split_with_sizes", "unflatten", "flatten",
    "__getitem__", "select", "narrow", "squeeze", "unsqueeze", "ravel", "expand", "contiguous",
    "view_as", "diagonal", "unfold", "as_strided",
})  # fmt: skip
OPERATORS = frozenset({
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
})  # fmt: skip
FSDP1 = "torch.distributed.fsdp._flat_param"
NO_WRITES = frozenset({"requires_grad_", "retain_grad", "share_memory_", "record_stream"})


class AdaptedWeight(Tensor):
    """w' [N, K]; knows the weight that a write to it means."""

    _frozen: Tensor | None  # None for a part of w'
    _is_param = True  # stands for one: Module.get_parameter asks

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` as on a plain tensor; a write on w."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if _writes(name, kwargs):
                args, kwargs = _redirected(name, args, kwargs)
            result = func(*args, **kwargs)
        if not args or not isinstance(args[0], AdaptedWeight):
            return result
        if name == "detach" or (name == "__get__" and _shares(result, args[0])):
            return _of_frozen(result, args[0]._frozen)
        return _parts(func, args, kwargs, result) if name in VIEWS else result


def writing_to(weight: Tensor, frozen: Tensor) -> Tensor:
    """``weight``, w' of ``frozen``, as a tensor whose writes go to ``frozen``; plain in traces."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return weight
    return _of_frozen(weight, frozen) if type(weight) is Tensor else weight


def _of_frozen(weight: Tensor, frozen: Tensor | None) -> AdaptedWeight:
    read = weight.as_subclass(AdaptedWeight)
    read._frozen = frozen
    return read


def _parts(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """Each view of w' knows the same view of w; a copy knows none."""
    frozen = args[0]._frozen
    leaves, tree = tree_flatten(result)
    places: list[Any] = [None] * len(leaves)
    if frozen is not None:
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            views = tree_leaves(func(frozen, *args[1:], **kwargs))
            places = [view if _same_storage(view, frozen) else None for view in views]
    plain = (type(leaf) is Tensor and _same_storage(leaf, args[0]) for leaf in leaves)
    both = zip(leaves, places, plain, strict=True)
    return tree_unflatten([_of_frozen(t, w) if view else t for t, w, view in both], tree)


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _shares(result: Any, read: Tensor) -> bool:
    """Whether an attribute is ``.data``: all of the tensor, without its gradient."""
    return (
        type(result) in (Tensor, AdaptedWeight)
        and result.shape == read.shape
        and result.data_ptr() == read.data_ptr()
    )


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    if name in NO_WRITES:
        return False
    inplace = name.endswith("_") and not name.startswith("__")
    return inplace or name in OPERATORS or "out" in kwargs


def _redirected(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with w in the place that is written."""
    if args and isinstance(args[0], AdaptedWeight):
        return (_target(args[0], name), *args[1:]), kwargs
    for key in ("tensor", "out", "input"):
        if isinstance(kwargs.get(key), AdaptedWeight):
            kwargs = kwargs | {key: _target(kwargs[key], name)}
    return args, kwargs


def _target(read: AdaptedWeight, name: str) -> Tensor:
    if read._frozen is None:
        raise RuntimeError(
            f"{name}: this part of w + s b a was made for one read, and what is written into it is "
            "lost: write the weight itself, or unpatch the model first"
        )
    return read._frozen


def set_frozen(owner: nn.Module, tensor: str, value: Tensor) -> None:
    """Another frozen weight in the place of ``owner``'s: a parameter, or a copy made of one."""
    owner.__dict__.pop("_deleted", None)
    if isinstance(value, nn.Parameter) and not isinstance(value, AdaptedWeight):
        owner.__dict__.pop(tensor, None)
        owner._parameters[tensor] = value
    else:
        owner._parameters.pop(tensor, None)
        owner.__dict__[tensor] = value


def delete_frozen(owner: nn.Module, tensor: str) -> None:
    """Without a weight, until another is put there."""
    if tensor not in owner.__dict__:
        raise AttributeError(f"{type(owner).__name__} has no {tensor}")
    del owner.__dict__[tensor]


def keep_deleted(owner: nn.Module, tensor: str) -> None:
    """Remember the parameter that is about to go, should a parametrisation turn out to want it.

    Raises:
        RuntimeError: FSDP1 wants it, which would take each read of w' for another weight of the
            user's and write it into the frozen one.
    """
    if sys._getframe(2).f_globals.get("__name__") == FSDP1:
        raise RuntimeError(
            f"{tensor} of a {type(owner).__name__} reads w + s b a, which FullyShardedDataParallel "
            "(FSDP1) would write into the frozen weight: use fully_shard (FSDP2), or wrap this "
            "module in none (ignored_modules)"
        )
    if (parameter := owner._parameters.get(tensor)) is not None:
        owner.__dict__["_deleted"] = (tensor, parameter)


def refuse_parametrized(owner: nn.Module, *tensors: str) -> None:
    """Raises RuntimeError: the property of a parametrisation would hide the adapters' one."""
    if deleted := owner.__dict__.pop("_deleted", None):
        owner._parameters[deleted[0]] = deleted[1]
    if type(owner).__name__.startswith("Parametrized"):
        owner.__class__ = type(owner).__mro__[1]
    raise RuntimeError(
        f"{' and '.join(tensors)} of a {type(owner).__name__} reads w + s b a, which a "
        "parametrisation would hide: unpatch the model first"
    )


def refuse_read(owner: nn.Module, name: str, parameter: Tensor | None) -> None:
    """Raises RuntimeError where w' would be registered, as pruning does, and be adapted twice."""
    if isinstance(parameter, AdaptedWeight):
        raise RuntimeError(
            f"{name} of a {type(owner).__name__} would be w + s b a, which is made for one read: "
            "prune or parametrise before patch, or unpatch the model first"
        )


# Adapters on a weight that others read without calling its module: w' = w + s b a at every read.
#
# The frozen parameter stays where it is, under its key; only what a read of the attribute returns
# changes, by a property of the class that the module is given. (``torch.nn.utils.parametrize`` puts
# the same property there, but moves the parameter to a key of its own and cannot be pickled.)


READABLE = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class FusedLoRAWeight(AdaptedLinear):
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
    ) -> FusedLoRAWeight:
        """Turn ``linear`` itself into one of these; ``spans`` of {"": (0, N)} for one adapter."""
        config = check_weight_config(AdapterConfig.of("FusedLoRAWeight", options))
        if type(linear) not in READABLE:
            raise TypeError(f"a {type(linear).__name__} cannot be adopted, {READABLE} can")
        if why := why_not_replaceable(linear):
            raise TypeError(f"the linear to adopt: {why}")
        was = type(linear)
        linear.__class__ = cls
        read = cast(FusedLoRAWeight, linear)
        try:
            read._attach(spans, rank, config, generator)
            check_spans(read._spans, read.out_features)
        except Exception:
            _remove_adapters(read)
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
        set_frozen(self, "weight", value)

    @weight.deleter
    def weight(self) -> None:
        delete_frozen(self, "weight")

    def read(self, base: Tensor) -> Tensor:
        """w' of the frozen weight that stands in ``base``."""
        if not self.adapter_enabled:
            return self._base[0] if self._base else base
        if self._base:
            self._refuse_training_merged()
            return base
        return writing_to(self._formed(base), base)

    def _formed(self, w: Tensor) -> Tensor:  # [N, K]
        refuse_constant("w + s b a, an adapted weight,")
        a, b = self._operands()
        scales = self._scales if torch.compiler.is_compiling() else self.scales
        return adapted_weight(w, a, b, scales, self._used)

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


def adapted_weight(
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


def check_weight_config(config: AdapterConfig) -> AdapterConfig:
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


def _remove_adapters(read: AdaptedLinear) -> None:
    for name in [name for name in read._parameters if name.startswith("lora_")]:
        del read._parameters[name]
    for name in STATE:
        read.__dict__.pop(name, None)
