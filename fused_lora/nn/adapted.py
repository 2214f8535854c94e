"""What every adapted linear shares: parameters, init, merged state, keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from fused_lora.arguments import number, whole
from fused_lora.nn.config import CHANGES_BASE, OF_WEIGHT, AdapterConfig, check_start, draw
from fused_lora.nn.grouped_call import grouped_result
from fused_lora.nn.linear_state import BaseCodes, settle
from fused_lora.nn.shared_parameters import (
    ParameterSlice,
    parameter_slices,
    remove_hook,
    sharers_of,
)
from fused_lora.nn.stand_in import (
    Unscripted,
    as_one_node,
    bound_forward,
    made_weight,
    offloaded,
    own_tensor,
    rebind,
    why_not_replaceable,
)
from fused_lora.nn.variants import WithVariants, key_of
from fused_lora.ops.lora_dropout import seeded
from fused_lora.ops.lora_linear import lora_linear, operation_for
from fused_lora.ops.lora_linear_fp8 import lora_linear_fp8
from fused_lora.ops.lora_merge import Job, lora_merge_many
from fused_lora.ops.operand import is_sharded
from fused_lora.programs.run import Memo, program_of, run, transformed
from fused_lora.types import Span

Self = TypeVar("Self", bound="AdaptedLinear")
STATE = (  # beside the parameters
    "config",
    "adapter_enabled",
    "_groups",
    "_names",
    "_spans",
    "_used",
    "_narrowed",
    "_has_sharers",
    "_scales",
    "_base",
    "_origin",
    "_grouped",
    "_codes",
    "_memo",
)


def merge_together(
    modules: Sequence[AdaptedLinear], rounding: str = "nearest", seed: int = 0, impl: str = "auto"
) -> None:
    """Merge all modules or none, in as few launches as serve them; the seed counts on."""
    with torch.no_grad():
        jobs = [module.merge_job(rounding, seed + i) for i, module in enumerate(modules)]
        merged = zip(modules, lora_merge_many(jobs, rounding, impl=impl), strict=True)
        done = [module._finished(weight) for module, weight in merged]
    for module, weight in zip(modules, done, strict=True):
        module._take_merged(weight)


def check_rank(rank: int, where: str) -> None:
    """Raises ValueError unless ``rank`` is a whole number from 1 on."""
    whole(f"{where}: rank", rank)


class AdaptedLinear(Unscripted, WithVariants):
    """An ``nn.Linear`` with one adapter (a, b) per named group of output columns.

    Parameters beyond the linear's own: ``lora_A`` [R, K] and ``lora_B`` [columns, R], with the
    suffix ``_<group>`` where groups are named; with the options ``mid`` and ``dora`` also
    ``lora_mid`` and ``lora_magnitude``. The base's state-dict keys stay as they are, and a
    checkpoint without adapter keys loads strictly.
    """

    config: AdapterConfig
    plain: type[nn.Linear] = nn.Linear  # what it was, and becomes on release
    additive = False  # whether the base is computed by a forward of its own
    _codes: BaseCodes | None = None  # of the frozen weight, where the base is in FP8
    _names: tuple[str, ...] | None = None  # of weight, bias, every a and b, where all are its own
    _grouped = False  # whether another of its group may have computed its y (``GroupedCall``)

    def _attach(
        self,
        columns: Mapping[str, tuple[int, int]],
        ranks: Mapping[str, int],
        config: AdapterConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        for name in columns:
            check_rank(ranks[name], type(self).__name__ + (name and f" {name}"))
        spans = {name: Span(*columns[name], ranks[name]) for name in columns}
        self._describe(spans, [config.scale_for(ranks[name]) for name in columns], config)
        check_start(config.init, self.base, self._spans, list(self.scales))
        for name, span in spans.items():
            a, b = self._empty(span.rank, self.in_features), self._empty(span.width, span.rank)
            self.register_parameter(key_of("lora_A", name), a)
            self.register_parameter(key_of("lora_B", name), b)
            self._register_variants(name, span)
        if not config.mid:
            halves = [key_of(half, name) for half in ("lora_A", "lora_B") for name in columns]
            self._names = ("weight", "bias", *halves)
        self.reset_adapters(generator)

    def _describe(
        self, spans: Mapping[str, Span], scales: Sequence[float], config: AdapterConfig
    ) -> None:
        self.config = config
        self.adapter_enabled = True
        self._groups = tuple(spans)
        self._spans = tuple(spans.values())
        self._used = self._spans  # what the forward computes with: fewer ranks where narrowed
        self._narrowed = False
        self._has_sharers = False  # whether another module computes with parts of these adapters
        self._scales = torch.tensor(scales, dtype=torch.float64, device="cpu")
        self._base: tuple[Tensor, ...] = ()  # the frozen weight, while merged
        self._origin: tuple[Tensor, ...] = ()  # the weight as it was, where the init changed it
        if config.base_dtype:
            self._codes = BaseCodes()

    @property
    def base(self) -> Tensor:
        """The frozen weight; while merged, w' stands in its place."""
        return own_tensor(self)

    def _put_base(self, weight: Tensor) -> None:
        self.weight = cast(nn.Parameter, weight)

    def _empty(self, *shape: int) -> nn.Parameter:
        device, dtype = self.base.device, self.config.adapter_dtype
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    @property
    def groups(self) -> dict[str, Span]:
        """The span of each adapter, by group name."""
        return dict(zip(self._groups, self._spans, strict=True))

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor s of each adapter."""
        return tuple(float(scale) for scale in self._scales)  # no tolist() in a transform of 2.9

    @property
    def active_rank(self) -> int | None:
        """How many leading ranks of each adapter compute and train; None for all of them.

        The rest of a and b is left out of the forward, the gradient and ``merge``, without a copy
        (rank-prefix training, DyLoRA, Valipour et al. 2022). Scales and state dicts stay as they
        are; an adapter of a lower rank is used whole.
        """
        return max(span.rank for span in self._used) if self._narrowed else None

    @active_rank.setter
    def active_rank(self, rank: int | None) -> None:
        self._refuse_merged("active_rank")
        top = max(span.rank for span in self._spans)
        if rank is not None:
            check_rank(rank, "active_rank")
            if rank > top:
                raise ValueError(f"active_rank must be at most the rank {top}, got {rank}")
        self._used = tuple(replace(s, rank=min(rank or top, s.rank)) for s in self._spans)
        self._narrowed = self._used != self._spans

    def set_scale(self, scale: float, group: str | None = None) -> None:
        """Change s of one adapter, or of all; compiled graphs see it without recompiling."""
        scale = float(number("scale", scale))
        if group is not None and group not in self._groups:
            raise ValueError(f"no adapter named {group!r}; this module has {self._groups}")
        self._refuse_merged("set_scale")
        self._scales[slice(None) if group is None else self._groups.index(group)] = scale

    def reset_adapters(self, generator: torch.Generator | None = None) -> None:
        """Start a and b anew, as the ``init`` says: the module computes its base again."""
        self._refuse_merged("reset_adapters")
        if self._origin:
            self._put_base(self._origin[0])
            self._origin = ()
        if self.lora_parameters()[0].is_meta:
            return
        init = self.config.init
        if init in OF_WEIGHT:
            self._refuse_sharded("reset_adapters")
        for name, span, scale in zip(self._groups, self._spans, self.scales, strict=True):
            a, b = self.adapter(name)
            draw(init, self.base[span.start : span.stop], a, b, scale, generator)
            if init == "svd":
                for half in (a, b):
                    half.requires_grad_(False)
        self._reset_variants()
        if init in CHANGES_BASE:
            self._take_from_base()
        self.refresh_base()

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

    def adapter(self, group: str = "") -> tuple[Tensor, Tensor]:
        """(a [R, K], b [columns, R]) of one group: parameters, whatever ``active_rank`` is."""
        if group not in self._groups:
            raise ValueError(f"no adapter named {group!r}; this module has {self._groups}")
        return getattr(self, key_of("lora_A", group)), getattr(self, key_of("lora_B", group))

    def adapters(self) -> list[tuple[Tensor, Tensor]]:
        """(a, b) of every group, in order."""
        return [self.adapter(name) for name in self._groups]

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        a = [getattr(self, key_of("lora_A", name)) for name in self._groups]
        b = [getattr(self, key_of("lora_B", name)) for name in self._groups]
        return self._parts(a, b) if self._has_sharers or self._narrowed else (a, b)

    def _parts(self, a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        used = self._used
        slices = [ParameterSlice(0, span.rank, self.in_features) for span in used]
        slices += [ParameterSlice(0, span.width, span.rank) for span in used]
        parts = parameter_slices([*a, *b], slices)
        return parts[: len(a)], parts[len(a) :]

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features], which goes by torch.nn.Linear's name."""
        x = input
        if self._grouped and (y := grouped_result(self, x)) is not None:
            return y
        if torch.compiler.is_compiling() or transformed():
            return self._as_written(x)
        if isinstance(x, Proxy):
            return as_one_node(self, x, x)  # type: ignore[no-any-return]
        own = self.__dict__
        memo = own.get("_memo") or self._new_memo()
        operands, held = self._gather()
        inputs: Sequence[Any] = (x, *operands)
        key, operation, program = memo.recall(self._state(), inputs, held)
        known = program is not None
        if not known:
            operation, program = self._choose(inputs)
            if operation is None:
                memo.keep(key, None, program)
        if operation is None:
            return self._as_written(x)
        if operation.seeds:
            inputs = seeded(operation, inputs)
        if not known:
            program = program_of(operation, inputs)
            memo.keep(key, operation, program)
        return run(program, operation, inputs)  # type: ignore[no-any-return]

    def _new_memo(self) -> Memo:
        return self.__dict__.setdefault("_memo", Memo())

    def _gather(self) -> tuple[list[Tensor | None], bool]:
        """weight, bias, every a and every b that the forward computes with, None for a seed, and
        whether all are parameters of its own, whole: not made of others by a hook, a
        parametrisation or a slice of another's."""
        drops: list[Any] = [None] if self.config.dropout and self.training else []
        if self._names is not None and not (self._has_sharers or self._narrowed):
            own = self._parameters
            try:
                held: list[Any] = [own[name] for name in self._names]
                return held + drops, True
            except KeyError:
                pass
        a, b = self._operands()
        return [self.base, self.bias, *a, *b, *drops], False

    def _state(self) -> tuple[Any, ...]:
        """What beside its tensors decides how a forward computes."""
        own, scales = self.__dict__, self._scales
        try:
            written: Any = scales._version
        except RuntimeError:  # made under inference mode, where nobody counts
            written = self.scales
        return (
            own["adapter_enabled"],
            not own["_base"],
            own["training"],
            own["config"],
            own["_used"],
            id(scales),
            written,
        )

    def _choose(self, inputs: Sequence[Any]) -> tuple[Any, Any]:
        """The operation that the forward is; (None, why) where it is several."""
        if reason := self._why_several():
            return None, reason
        x, w, bias, *ab = inputs
        groups = len(self._used)
        given = (x, w, bias, ab[:groups], ab[groups : 2 * groups], self.scales, self._used)
        dropout = self.config.dropout if self.training else 0.0
        return operation_for(*given, self.config.impl, dropout), None  # type: ignore[arg-type]

    def _why_several(self) -> str | None:
        """Why the forward is not one operation at present; None where it is."""
        if not self.adapter_enabled or self._base:
            return "merged or disabled adapters"
        if self.config.dora:
            return "DoRA"
        return f"a base in {self.config.base_dtype}" if self._codes is not None else None

    def _as_written(self, x: Tensor) -> Tensor:
        if not self.adapter_enabled:
            return F.linear(x, self._frozen(), self.bias)
        if self._base:
            self._refuse_training_merged()
            return F.linear(x, self.base, self.bias)
        if not self.config.dora:
            return self._adapted(x, self.bias)
        y = self._adapted(x, None)
        y = y * self._output_factors().to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _adapted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        a, b = self._operands()
        scales, spans, config = self._scales, self._used, self.config
        if self._codes is not None:
            codes = self._codes.of(self.base)
            return lora_linear_fp8(x, codes, bias, a, b, scales, spans, impl=config.impl)
        dropout = config.dropout if self.training else 0.0
        given = (x, self.base, bias, a, b, scales, spans)
        return lora_linear(*given, impl=config.impl, dropout=dropout)

    def refresh_base(self) -> None:
        """Form the FP8 codes of the frozen weight anew, where the base is in FP8.

        A forward sees by itself that the weight is another or was written in place, unless the
        write went through ``weight.data`` or the module is compiled: call this then.
        """
        if self._codes is not None:
            self._codes.refresh(self._base[0] if self._base else self.base)

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
        """Replace ``weight`` by w' = w + s b a; the frozen weight is kept, unchanged.

        Args:
            rounding: "nearest" or "stochastic" (16-bit weights; unbiased, by ``seed``).
            seed: key of the counter-based generator.
            impl: "auto", "aten", "reference", or "cuda" for the compiled kernel.
        """
        merge_together([self], rounding, seed, impl)

    def merge_job(self, rounding: str, seed: int) -> Job:
        """The merge of this layer; raises RuntimeError where there is none to do."""
        self.check_mergeable()
        return self._merge_job(rounding, seed)

    def check_mergeable(self) -> None:
        """Raises RuntimeError where ``merge`` would find no weight that it may replace."""
        if self.merged:
            raise RuntimeError("merge: already merged")
        self._refuse_sharded("merge")
        self._refuse_made("merge")
        self._refuse_offloaded("merge")

    def _take_merged(self, merged: Tensor) -> None:
        self._base = (self.base,)
        self._put_base(nn.Parameter(merged, requires_grad=False))

    def _refuse_sharded(self, action: str) -> None:
        shape = (self.out_features, self.in_features)
        if is_sharded(self.base) or tuple(self.base.shape) != shape:
            raise RuntimeError(
                f"{action}: the weight is sharded over processes (FSDP), which would put it back: "
                f"{action} an unsharded copy of the model"
            )

    def _refuse_offloaded(self, action: str) -> None:
        if why := offloaded(self):
            raise RuntimeError(f"{action}: {why}")

    def _refuse_made(self, action: str) -> None:
        if why := made_weight(self):
            raise RuntimeError(f"{action}: {why}")

    def unmerge(self) -> None:
        """Put the frozen weight back: the same parameter, the same bits."""
        if not self.merged:
            raise RuntimeError("unmerge: not merged")
        self._refuse_offloaded("unmerge")
        self._refuse_made("unmerge")
        self._put_base(self._base[0])
        self._base = ()

    def release(self) -> nn.Linear:
        """Become a plain ``nn.Linear`` again, dropping the adapters; keeps w' if merged."""
        self.check_releasable()
        if self.merged:
            self.base.requires_grad_(self._base[0].requires_grad)
        elif self._origin:
            self._put_base(self._origin[0])
        for name in [name for name in self._parameters if name.startswith("lora_")]:
            del self._parameters[name]
        for name in STATE:
            self.__dict__.pop(name, None)
        was = type(self)
        self.__class__ = self.plain  # type: ignore[assignment]
        rebind(self, was)
        return self

    def check_releasable(self) -> None:
        """Raises RuntimeError where ``release`` would lose something."""
        self._refuse_sharded("release")
        if self._has_sharers and (students := len(sharers_of(self))):
            raise RuntimeError(
                f"release: {students} modules of a student compute with these adapters: unpatch "
                "or unshare the student first"
            )
        if is_parametrized(self):
            raise RuntimeError(
                f"release: {sorted(self.parametrizations)} are parametrized: call "  # type: ignore[arg-type]
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if bound_forward(self):
            raise RuntimeError(
                "release: a forward was bound to the instance since it was adapted, and may hold "
                "the adapted one: delete the attribute `forward` first"
            )

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        hidden = {name: self.__dict__[name] for name in ("_base", "_origin") if self.__dict__[name]}
        for parameter in self.lora_parameters() if self._has_sharers or self._narrowed else ():
            remove_hook(parameter)
        for name, (weight,) in hidden.items():  # moved as any parameter is, in place if it can
            self._parameters[name] = weight
        try:
            return super()._apply(fn, recurse)
        finally:
            for name in hidden:
                self.__dict__[name] = (cast(nn.Parameter, self._parameters.pop(name)),)
            self.refresh_base()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.merged:  # w would be wrong for who exports, w' for who trains on
            raise RuntimeError(
                f"state_dict: {prefix[:-1] or 'this module'} is merged, and holds w + s b a beside "
                "a and b: call fused_lora.unpatch(model, merge=True) to export the model that it "
                "computes (save_pretrained, safetensors, offloading), fused_lora.unmerge(model) "
                "for a checkpoint, fused_lora.save(model, folder) for the adapters alone"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        self.refresh_base()
        own = [prefix + name for name in self._parameters if name.startswith("lora_")]
        missing_keys += [key for key in missing if key not in own]
        vanilla = settle(missing_keys, unexpected_keys, own, missing)
        if vanilla and self._origin:
            error_msgs.append(
                f"{prefix[:-1]} was started by init={self.config.init!r}, whose base is not the "
                "checkpoint's: load the checkpoint first, then patch"
            )

    def extra_repr(self) -> str:
        """The linear's own line, then the adapters'."""
        adapters = ", ".join(f"{name or 'rank'}={span.rank}" for name, span in self.groups.items())
        scale = ", ".join(f"{s:g}" for s in self.scales)
        state = ", merged" * self.merged + ", disabled" * (not self.adapter_enabled)
        state = f", base={self.config.base_dtype}" * (self._codes is not None) + state
        return f"{super().extra_repr()}, {adapters}, scale={scale}{state}"


def check_adoptable(linear: nn.Module, where: str) -> nn.Linear:
    """``linear`` itself; raises TypeError unless it is an ``nn.Linear`` and nothing else."""
    if isinstance(linear, AdaptedLinear):
        raise TypeError(f"{where} already carries adapters ({type(linear).__name__})")
    if why := made_weight(linear):  # a parametrised linear has a class of its own
        raise TypeError(f"{where}: {why}")
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"{where} is a {type(linear).__module__}.{type(linear).__name__}, not a plain "
            "torch.nn.Linear: its own forward would be lost; keep_forward=True keeps it and adds "
            "the adapters to its result"
        )
    if why := why_not_replaceable(linear):
        raise TypeError(f"{where}: {why}")
    return linear
