"""SharedLoRALinear: an ``nn.Linear`` whose adapters are slices of another's.

a_s = a_t[:R, :K_s]     b_s = b_t[first : first + N_s, :R]     per group; s as the owner's
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.nn.adapted import AdaptedLinear, check_adoptable, check_rank, key_of
from fused_lora.nn.config import CHANGES_BASE, AdapterConfig
from fused_lora.nn.linear import FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.nn.shared_parameters import (
    ParameterSlice,
    SharedAdapter,
    add_sharer,
    parameter_slices,
    remove_sharer,
)
from fused_lora.nn.stand_in import rebind, version_of


class SharedLoRALinear(AdaptedLinear):
    """An adopted ``nn.Linear`` that computes with slices of other modules' adapters.

    It owns its base and nothing else: the adapters stay the owners' parameters, so parameters,
    state dicts and optimizers see each of them once. Their gradient arrives in the owner's.
    ``own`` gives it parameters of its own, copies of the slices. Copy or pickle it together with
    its owners, or call ``own`` first: a copy made alone holds copies of the owners that no module
    registers.
    """

    _shared: tuple[SharedAdapter, ...]
    _version_seen: int  # of the base, when its owners were last found registered

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        shared_adapters: Mapping[str, SharedAdapter],
        config: AdapterConfig,
    ) -> SharedLoRALinear:
        """Turn ``linear`` itself into one of these; ``shared_adapters`` go by group name.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``.
            ValueError: a part that leaves its owner's adapter, with the sizes seen.
        """
        check_adoptable(linear, "the linear to adopt")
        for name, shared in shared_adapters.items():
            _check(shared, linear.in_features, f"group {name!r}" if name else "the adapter")
        linear.__class__ = cls  # type: ignore[assignment]
        rebind(linear, nn.Linear)
        assert isinstance(linear, SharedLoRALinear)
        scales = [_scale(shared) for shared in shared_adapters.values()]
        spans = {name: shared.span for name, shared in shared_adapters.items()}
        linear._describe(spans, scales, config)
        linear._shared = tuple(shared_adapters.values())
        linear._version_seen = version_of(linear.base)
        for shared in linear._shared:
            add_sharer(shared.owner, linear)
            shared.owner._has_sharers = True
        return linear

    @property
    def shared_adapters(self) -> dict[str, SharedAdapter]:
        """What each group computes with, by its name."""
        return dict(zip(self._groups, self._shared, strict=True))

    def adapter(self, group: str = "") -> tuple[Tensor, Tensor]:
        """(a [R, K], b [columns, R]) of one group: views into the owner's parameters."""
        if group not in self._groups:
            raise ValueError(f"no adapter named {group!r}; this module has {self._groups}")
        index = self._groups.index(group)
        shared, span = self._shared[index], self._spans[index]
        with torch.enable_grad():
            a, b = _adapter_of(shared)
            return self._slice_a(span.rank).of(a), _slice_b(shared, span.rank).of(b)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_version_seen"] = version_of(self.base)  # a copy's tensors count from 0

    def _check_owners(self) -> None:
        """Raises RuntimeError where this is a copy whose base is kept up, and its adapters not.

        An average of a student (EMA) writes what its state dict holds. Copied without its teacher,
        it computes with copies of the adapters that nothing holds but itself, and none can write.
        """
        if torch.compiler.is_compiling() or self._version_seen == (
            version := version_of(self.base)
        ):
            return
        for shared in self._shared:
            if not _is_registered(shared.owner):
                raise RuntimeError(
                    "the weights of this copy were written since it was made, as an average (EMA) "
                    "or a checkpoint does, but the adapters that it shares are held by no module "
                    "and are as old as the copy: copy or average the student together with its "
                    "teacher (both in one nn.ModuleList), or call unshare_adapters(student) first"
                )
        self._version_seen = version

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        self._check_owners()
        halves = [_adapter_of(shared) for shared in self._shared]
        slices = [self._slice_a(used.rank) for used in self._used]
        both = zip(self._shared, self._used, strict=True)
        slices += [_slice_b(shared, used.rank) for shared, used in both]
        parts = parameter_slices([*(a for a, _ in halves), *(b for _, b in halves)], slices)
        return parts[: len(halves)], parts[len(halves) :]

    def _slice_a(self, rank: int) -> ParameterSlice:
        return ParameterSlice(0, rank, self.in_features)

    def own(self) -> AdaptedLinear:
        """Make copies of the parts parameters of this module, which then shares nothing."""
        copies = {name: self.adapter(name) for name in self._groups}
        self._stop_sharing()
        self.__class__ = FusedLoRALinear if "" in copies else FusedLoRAGroupedLinear  # type: ignore
        rebind(self, SharedLoRALinear)
        for name, halves in copies.items():
            for half, part in zip(("lora_A", "lora_B"), halves, strict=True):
                copy = part.detach().clone(memory_format=torch.contiguous_format)
                self.register_parameter(
                    key_of(half, name), nn.Parameter(copy, requires_grad=part.requires_grad)
                )
        return self

    def release(self) -> nn.Linear:
        """Become a plain ``nn.Linear`` again; the owners keep their adapters."""
        self.check_releasable()
        self._stop_sharing()
        return super().release()

    def _stop_sharing(self) -> None:
        self.__dict__.pop("_version_seen", None)
        for shared in self.__dict__.pop("_shared"):
            remove_sharer(shared.owner, self)

    def reset_adapters(self, generator: torch.Generator | None = None) -> None:
        """Raises RuntimeError: the owners draw theirs."""
        raise RuntimeError("reset: these adapters are parts of another module's; reset that one")

    def reset_parameters(self) -> None:
        """Raises RuntimeError, as ``reset_adapters`` does."""
        self.reset_adapters()

    def extra_repr(self) -> str:
        """The adapted linear's line, and that it shares."""
        return f"{super().extra_repr()}, shared"


def _is_registered(owner: nn.Module) -> bool:
    """Whether some module has ``owner`` among its children; asked rarely, for it looks at all."""
    tables = (each for each in gc.get_referrers(owner) if isinstance(each, dict))
    return any(
        any(child is owner for child in table.values())
        and all(child is None or isinstance(child, nn.Module) for child in table.values())
        for table in tables
    )


def _adapter_of(shared: SharedAdapter) -> tuple[Tensor, Tensor]:
    if shared.group not in shared.owner.__dict__.get("_groups", ()):
        raise RuntimeError(
            f"the adapter {shared.group!r} that this module shares is gone: its owner was unpatched"
        )
    return shared.owner.adapter(shared.group)


def _slice_b(shared: SharedAdapter, rank: int) -> ParameterSlice:
    return ParameterSlice(shared.first, shared.first + shared.span.width, rank)


def _scale(shared: SharedAdapter) -> float:
    return dict(zip(shared.owner.groups, shared.owner.scales, strict=True))[shared.group]


def _check(shared: SharedAdapter, k: int, where: str) -> None:
    config = shared.owner.config
    if config.dora or config.mid or config.init in CHANGES_BASE:
        raise ValueError(
            f"{where}: its owner has dora={config.dora}, mid={config.mid!r}, init={config.init!r}; "
            "of these only plain a and b can be shared"
        )
    a, b = shared.owner.adapter(shared.group)
    check_rank(shared.span.rank, where)
    stop = shared.first + shared.span.width
    if shared.span.rank > len(a) or k > a.shape[1] or stop > len(b):
        raise ValueError(
            f"{where}: a [{shared.span.rank}, {k}] and rows {shared.first} to {stop} of b do not "
            f"lie in the owner's a {list(a.shape)} and b {list(b.shape)}"
        )
