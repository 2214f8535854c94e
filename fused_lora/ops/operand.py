"""One adapted matrix as the block operations take it; what FSDP does to its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.arguments import one_of
from fused_lora.ops.chain.stage import Optional
from fused_lora.ops.lora_dropout import check_dropout
from fused_lora.ops.lora_linear import Frame, autocasts, resolve
from fused_lora.ops.lora_linear_plain import check
from fused_lora.types import Impl, Span


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process holds a part only."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``; where it is sharded, every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(value: Tensor, destination: Tensor) -> Tensor:
    """``value``, sharded as ``destination`` is; every process must hold all of it."""
    if not is_sharded(destination):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = destination.device_mesh, destination.placements  # type: ignore[attr-defined]
    whole = value.to(destination.device)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)  # nothing is sent


def writes(model: nn.Module) -> bool:
    """Whether this process is the one to write files: all are, unless the model is sharded."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return True
    return torch.distributed.get_rank() == 0


class Adapted(NamedTuple):
    """The operands of ``lora_linear`` without x; it has no property, as ``Frame`` has none."""

    w: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    a: Sequence[Tensor]  # G of [R_g, K]
    b: Sequence[Tensor]  # G of [N_g, R_g]
    scales: Sequence[float]  # G
    spans: tuple[Span, ...] | None = None  # None for one adapter on all columns
    impl: Impl | str = Impl.AUTO
    dropout: float = 0.0  # on the x of a

    def columns(self) -> tuple[Span, ...]:
        """The spans, spelled out."""
        if self.spans is not None:
            return tuple(self.spans)
        return (Span(0, self.w.shape[0], self.a[0].shape[0]),)

    def frame(self) -> Frame:
        """What of it is no tensor."""
        return Frame(tuple(self.scales), self.columns(), resolve(self.impl), self.dropout)

    def tensors(self) -> Optional:
        """What of it is; None for the seed, which each call draws."""
        return (self.w, self.bias, *self.a, *self.b, *((None,) if self.dropout else ()))

    def check(self, x: Tensor) -> None:
        """Raises TypeError or ValueError where it does not fit x or is inconsistent in itself."""
        check_dropout(self.dropout, "lora_linear")
        w, bias, a, b, scales = self[:5]
        check(x, w, bias, a, b, tuple(scales), self.columns(), autocasts(x))

    def check_behind(self, x: Tensor, width: int) -> None:
        """As ``check``, where what goes in is [..., width], computed from x."""
        self.check(x.new_empty(0, width))


class Norm(NamedTuple):
    """A LayerNorm over the last dimension."""

    gamma: Tensor | None  # [K]
    beta: Tensor | None  # [K]
    eps: float

    def check(self, x: Tensor) -> None:
        """Raises ValueError where it does not fit x."""
        for name, half in (("gamma", self.gamma), ("beta", self.beta)):
            if half is not None and half.shape != x.shape[-1:]:
                raise ValueError(
                    f"LayerNorm {name} must be [{x.shape[-1]}], got shape {tuple(half.shape)}"
                )


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a GEMM on x computes in: autocast's dtype if it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def check_frozen(**factors: Tensor | None) -> None:
    """Raises ValueError for a factor that asks for a gradient, which is not computed."""
    for name, factor in factors.items():
        if factor is not None and factor.requires_grad:
            raise ValueError(f"{name} has requires_grad, but no gradient of it is computed")


def check_recompute(recompute: str) -> None:
    """Raises ValueError unless ``recompute`` is one of the three."""
    one_of("recompute", recompute, RECOMPUTE)


RECOMPUTE = ("none", "elementwise", "gemm")  # in the order of what is made again in backward
