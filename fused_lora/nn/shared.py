"""SharedLoRALinear: an ``nn.Linear`` whose adapters are parts of another's.

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
from fused_lora.nn.shared_parameters import Box, Loan, borrow, forget, note
from fused_lora.nn.stand_in import rebind


class SharedLoRALinear(AdaptedLinear):
    """An adopted ``nn.Linear`` that computes with parts of other modules' adapters.

    It owns its base and nothing else: the adapters stay the owners' parameters, so parameters,
    state dicts and optimizers see each of them once. Their gradient arrives in the owner's.
    ``own`` makes the parts parameters of this module. Copy or pickle it together with its owners,
    or make it ``own`` them first: a copy made alone keeps copies of the owners out of sight.
    """

    _loans: tuple[Loan, ...]
    _seen: int  # how often the base had been written when its owners were last in sight

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        loans: Mapping[str, Loan],
        config: AdapterConfig,
    ) -> SharedLoRALinear:
        """Turn ``linear`` itself into one of these; ``loans`` go by group name.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``.
            ValueError: a part that leaves its owner's adapter, with the sizes seen.
        """
        check_adoptable(linear, "the linear to adopt")
        for name, loan in loans.items():
            _check(loan, linear.in_features, f"group {name!r}" if name else "the adapter")
        linear.__class__ = cls  # type: ignore[assignment]
        rebind(linear, nn.Linear)
        assert isinstance(linear, SharedLoRALinear)
        scales = [_scale(loan) for loan in loans.values()]
        linear._describe({name: loan.span for name, loan in loans.items()}, scales, config)
        linear._loans = tuple(loans.values())
        linear._seen = _version(linear.base)
        for loan in linear._loans:
            note(loan.owner, linear)
            loan.owner._lent = True
        return linear

    @property
    def loans(self) -> dict[str, Loan]:
        """What each group computes with, by its name."""
        return dict(zip(self._groups, self._loans, strict=True))

    def adapter(self, group: str = "") -> tuple[Tensor, Tensor]:
        """(a [R, K], b [columns, R]) of one group: views into the owner's parameters."""
        if group not in self._groups:
            raise ValueError(f"no adapter named {group!r}; this module has {self._groups}")
        index = self._groups.index(group)
        loan, span = self._loans[index], self._spans[index]
        with torch.enable_grad():
            a, b = _halves(loan)
            return self._box_a(span.rank).of(a), _box_b(loan, span.rank).of(b)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_seen"] = _version(self.base)  # of a copy, whose tensors count anew

    def _check_owners(self) -> None:
        """Raises RuntimeError where this is a copy whose base is kept up, and its adapters not.

        An average of a student (EMA) writes what its state dict holds. Copied without its teacher,
        it computes with copies of the adapters that nothing holds but itself, and none can write.
        """
        if torch.compiler.is_compiling() or self._seen == (version := _version(self.base)):
            return
        for loan in self._loans:
            if not _in_sight(loan.owner):
                raise RuntimeError(
                    "the weights of this copy were written since it was made, as an average (EMA) "
                    "or a checkpoint does, but the adapters that it shares lie out of their sight "
                    "and are as old as the copy: copy or average the student together with its "
                    "teacher (both in one nn.ModuleList), or call unshare_adapters(student) first"
                )
        self._seen = version

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        self._check_owners()
        halves = [_halves(loan) for loan in self._loans]
        ranked = [(loan, used.rank) for loan, used in zip(self._loans, self._used, strict=True)]
        boxes = [self._box_a(rank) for _, rank in ranked]
        boxes += [_box_b(loan, rank) for loan, rank in ranked]
        parts = borrow([*(a for a, _ in halves), *(b for _, b in halves)], boxes)
        return parts[: len(halves)], parts[len(halves) :]

    def _box_a(self, rank: int) -> Box:
        return Box(0, rank, self.in_features)

    def own(self) -> AdaptedLinear:
        """Make copies of the parts parameters of this module, which then shares nothing."""
        copies = {name: self.adapter(name) for name in self._groups}
        self._return_loans()
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
        self._return_loans()
        return super().release()

    def _return_loans(self) -> None:
        self.__dict__.pop("_seen", None)
        for loan in self.__dict__.pop("_loans"):
            forget(loan.owner, self)

    def reset_adapters(self, generator: torch.Generator | None = None) -> None:
        """Raises RuntimeError: the owners draw theirs."""
        raise RuntimeError("reset: these adapters are parts of another module's; reset that one")

    def reset_parameters(self) -> None:
        """Raises RuntimeError, as ``reset_adapters`` does."""
        self.reset_adapters()

    def extra_repr(self) -> str:
        """The adapted linear's line, and that it shares."""
        return f"{super().extra_repr()}, shared"


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _in_sight(owner: nn.Module) -> bool:
    """Whether some module has ``owner`` among its children; asked rarely, for it looks at all."""
    tables = (each for each in gc.get_referrers(owner) if isinstance(each, dict))
    return any(
        any(child is owner for child in table.values())
        and all(child is None or isinstance(child, nn.Module) for child in table.values())
        for table in tables
    )


def _halves(loan: Loan) -> tuple[Tensor, Tensor]:
    if loan.group not in loan.owner.__dict__.get("_groups", ()):
        raise RuntimeError(
            f"the adapter {loan.group!r} that this module shares is gone: its owner was unpatched"
        )
    return loan.owner.adapter(loan.group)


def _box_b(loan: Loan, rank: int) -> Box:
    return Box(loan.first, loan.first + loan.span.width, rank)


def _scale(loan: Loan) -> float:
    return dict(zip(loan.owner.groups, loan.owner.scales, strict=True))[loan.group]


def _check(loan: Loan, k: int, where: str) -> None:
    config = loan.owner.config
    if config.dora or config.mid or config.init in CHANGES_BASE:
        raise ValueError(
            f"{where}: its owner has dora={config.dora}, mid={config.mid!r}, init={config.init!r}; "
            "of these only plain a and b can be shared"
        )
    a, b = loan.owner.adapter(loan.group)
    check_rank(loan.span.rank, where)
    stop = loan.first + loan.span.width
    if loan.span.rank > len(a) or k > a.shape[1] or stop > len(b):
        raise ValueError(
            f"{where}: a [{loan.span.rank}, {k}] and rows {loan.first} to {stop} of b do not lie "
            f"in the owner's a {list(a.shape)} and b {list(b.shape)}"
        )
