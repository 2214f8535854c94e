"""What options put beside (a, b): a middle matrix, magnitudes, a base that the init changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fused_lora.nn.config import AdapterConfig
from fused_lora.ops.lora_merge import Job, lora_merge
from fused_lora.programs.run import without_autocast
from fused_lora.types import Span

# DoRA (Liu et al. 2024): y = (m / |w + s b a|) (x w'T) + bias, one m per output.
#
# w' = w + s b a, |.| the norm of each row; the norm takes no gradient (their section 4.3).


def row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """|w + s b a| of each row, [N], without a second [N, K].

    |w|² + 2 s (w aT) . b + s² (b a aT) . b, in fp32 or wider.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    a, b = a.detach().to(wide), b.detach().to(wide)
    own = torch.linalg.vector_norm(w, dim=1, dtype=wide).square()
    cross = ((w @ a.to(w.dtype).t()).to(wide) * b).sum(1)
    low = (b @ (a @ a.t()) * b).sum(1)
    return (own + 2 * scale * cross + scale * scale * low).clamp_min(0).sqrt()


def output_factors(
    w: Tensor,  # [N, K]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Sequence[float] | Tensor,  # G
    spans: Sequence[Span],  # G
    magnitudes: Sequence[Tensor],  # G of [N_g]
) -> Tensor:
    """m / |w + s b a|, [N]; 1 for columns that no adapter owns."""
    pieces, last = [], 0
    groups = zip(a, b, scales, spans, magnitudes, strict=True)
    for a_g, b_g, s, span, m in sorted(groups, key=lambda group: group[3].start):
        with torch.no_grad(), without_autocast(w.device):
            norm = row_norms(w[span.start : span.stop], a_g, b_g, s)
        pieces += [norm.new_ones(span.start - last), m / norm]
        last = span.stop
    return torch.cat([*pieces, pieces[-1].new_ones(w.shape[0] - last)])


# What options put beside (a, b): a middle matrix, magnitudes, a base that the init changed.
#
# mid           b' = b mid                          [N, R] [R, R], or diagonal: b diag(mid)
# dora          y = (m / |w'|) (x w'T) + bias       (``nn/variants.py``)
# pissa, olora  w - s b a stands in w's place, the original is kept


def key_of(part: str, group: str) -> str:
    """``lora_A`` of the group "q": ``lora_A_q``."""
    return f"{part}_{group}" if group else part


def start_of_mid(kind: str, rank: int, init: str) -> Tensor:
    """The middle that leaves b a as it is; 0 where b a is not 0 to begin with."""
    if init == "svd":
        return torch.zeros(rank) if kind == "diagonal" else torch.zeros(rank, rank)
    return torch.ones(rank) if kind == "diagonal" else torch.eye(rank)


def folded(b: Tensor, mid: Tensor) -> Tensor:
    """b mid, [N, R]; where a is frozen its gradient needs h alone, so x need not be kept."""
    return b * mid if mid.dim() == 1 else b @ mid


class WithVariants(nn.Linear):
    """The parameters that options add, and what they do to the operands of the equation."""

    config: AdapterConfig
    _groups: tuple[str, ...]
    _spans: tuple[Span, ...]
    _used: tuple[Span, ...]
    _scales: Tensor  # [G], float64 on the CPU
    _base: tuple[Tensor, ...]
    _origin: tuple[Tensor, ...]

    if TYPE_CHECKING:

        @property
        def scales(self) -> tuple[float, ...]: ...
        @property
        def base(self) -> Tensor: ...
        def _put_base(self, weight: Tensor) -> None: ...
        def adapters(self) -> list[tuple[Tensor, Tensor]]: ...
        def _pairs(self) -> tuple[list[Tensor], list[Tensor]]: ...
        def _empty(self, *shape: int) -> nn.Parameter: ...

    def _register_variants(self, name: str, span: Span) -> None:
        if self.config.mid:
            shape = (span.rank,) * (1 if self.config.mid == "diagonal" else 2)
            self.register_parameter(key_of("lora_mid", name), self._empty(*shape))
        if self.config.dora:
            self.register_parameter(key_of("lora_magnitude", name), self._empty(span.width))

    def _reset_variants(self) -> None:
        config = self.config
        with torch.no_grad():
            for name, span in zip(self._groups, self._spans, strict=True):
                if config.mid:
                    mid = getattr(self, key_of("lora_mid", name))
                    mid.copy_(start_of_mid(config.mid, span.rank, config.init))
                if config.dora:
                    getattr(self, key_of("lora_magnitude", name)).fill_(1)
            if config.dora:  # m / |w'| of ones is 1 / |w'|
                whole = 1 / self._output_factors()
                for name, span in zip(self._groups, self._spans, strict=True):
                    magnitude = getattr(self, key_of("lora_magnitude", name))
                    magnitude.copy_(whole[span.start : span.stop])

    def _take_from_base(self) -> None:
        """w - s b a in w's place, rounded once; the weight as it was is kept."""
        origin, scales = self.base, [-s for s in self.scales]
        a, b = zip(*self.adapters(), strict=True)
        with torch.no_grad():
            rest = lora_merge(origin, a, b, scales, self._spans)
        self._origin = (origin,)
        self._put_base(nn.Parameter(rest, requires_grad=origin.requires_grad))

    def lora_parameters(self) -> list[nn.Parameter]:
        """Every parameter that is not the linear's own: a, b, and what the options add."""
        own = self._parameters.items()
        return [p for name, p in own if name.startswith("lora_") and p is not None]

    def _operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """The a and b that the equation sees: the pairs, with the middle folded in."""
        a, b = self._pairs()
        if not self.config.mid:
            return a, b
        return a, [folded(b_g, mid) for b_g, mid in zip(b, self._mids(), strict=True)]

    def _mids(self) -> list[Tensor]:
        mids = [getattr(self, key_of("lora_mid", name)) for name in self._groups]
        parts = [
            (slice(span.rank),) * mid.dim() for mid, span in zip(mids, self._used, strict=True)
        ]
        return [mid[part] for mid, part in zip(mids, parts, strict=True)]

    def _output_factors(self) -> Tensor:
        magnitudes = [getattr(self, key_of("lora_magnitude", name)) for name in self._groups]
        scales = self._scales if torch.compiler.is_compiling() else self.scales
        weight = self._base[0] if self._base else self.base
        return output_factors(weight, *self._operands(), scales, self._used, magnitudes)

    def _frozen(self) -> Tensor:
        """The weight as it was before any adapter."""
        if self._origin:
            return self._origin[0].detach()
        return self._base[0] if self._base else self.base

    def _merge_job(self, rounding: str, seed: int) -> Job:
        wide = self.base
        if self.config.dora and rounding == "nearest":  # scaled before it is rounded
            wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
        elif self.config.dora:
            raise ValueError(f"merge: rounding={rounding!r} does not go with dora")
        return Job(wide, *self._operands(), self.scales, self._used, seed)

    def _finished(self, merged: Tensor) -> Tensor:
        """w' of what was merged; may write it."""
        if not self.config.dora:
            return merged
        return merged.mul_(self._output_factors()[:, None]).to(self.base.dtype)
